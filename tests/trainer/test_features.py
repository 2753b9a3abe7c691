"""Extractors: the built-in is what its digest says; TorchScript files and their names; the public file's way here."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from maskdiff import features
from maskdiff.errors import UserError

SQUEEZENET = Path(__file__).resolve().parents[3] / "shared" / "data" / "squeezenet-features.pt"


class Means(nn.Module):
    """Of the public file's calling convention."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.float().mean([2, 3])
        return means if return_features else means[:, :1]


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Four(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.float()


def saved(model: nn.Module, path: Path) -> Path:
    torch.jit.script(model).save(str(path))
    return path


def pictures(channels: int) -> Tensor:  # [2, 24, 24, channels] uint8
    numbers = torch.arange(2 * 24 * 24 * channels) * 37 % 251
    return numbers.view(2, 24, 24, channels).to(torch.uint8)


def test_the_built_in_is_what_its_digest_says():
    """Figures of different versions must not be compared: whoever changes what it computes gives it a new digest."""
    extractor = features.load(device="cpu")
    found = extractor(pictures(3))
    assert (extractor.name, extractor.digest, extractor.width) == ("builtin", "a98d781330248857", 560)
    assert found.shape == (2, 560) and found.dtype == torch.float32
    few = found[0, [0, 200, 400, 530]].tolist() + [found.double().mean().item()]
    assert few == pytest.approx([2.0525, 0.7902, 0.0525, -0.0091, 0.7311], abs=2e-4)
    batches = extractor.features([pictures(3)[:1], pictures(3)[1:]])
    torch.testing.assert_close(batches, found, rtol=1e-5, atol=1e-5)
    grey = pictures(1)
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, -1, -1, 3)))
    for wrong in (pictures(3).float(), pictures(3)[0], pictures(2)):
        with pytest.raises(UserError, match="uint8 images"):
            extractor(wrong)


def test_a_torchscript_file_goes_under_its_own_name(tmp_path):
    path = saved(Means(), tmp_path / "means.pt")
    extractor = features.load(path, "cpu")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (extractor.name, extractor.digest, extractor.width) == ("means", sha256[:16], 3)
    assert extractor.title == "Frechet distance (means)"
    assert torch.equal(extractor(pictures(3)), pictures(3).float().mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "model", "said"),
    [
        ("plain.pt", Plain(), "does not take model.*return_features"),
        ("four.pt", Four(), r"does not take model.*gives \[2, 3, 32, 32\]"),
        ("inception-2015-12-05.pt", Means(), "is not what its name says"),
        ("builtin.pt", Means(), "is not what its name says"),
        ("text.pt", None, "no TorchScript file, or it is damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, model, said):
    path = tmp_path / name
    path.write_text("not a model") if model is None else saved(model, path)
    with pytest.raises(UserError, match=said):
        features.load(path, "cpu")
    with pytest.raises(UserError, match="no such file"):
        features.load(tmp_path / "none.pt", "cpu")


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A server with a stand-in for the public file, and its hash instead of that one's; what it was asked for."""
    content = saved(Means(), tmp_path / "original.pt").read_bytes()
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.path)
            sent = content if self.path == "/whole" else content[: len(content) // 2]
            self.send_response(404 if self.path == "/none" else 200)
            self.send_header("Content-Length", str(len(content if self.path == "/cut" else sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("MASKDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(features, "INCEPTION_URL", f"http://127.0.0.1:{server.server_port}/whole")
    yield asked
    server.shutdown()
    server.server_close()


def test_the_public_file_is_fetched_once(public, tmp_path):
    for _ in range(2):
        extractor = features.load("inception", "cpu")
        assert (extractor.name, extractor.title) == ("inception-2015-12-05", "FID")
    assert public == ["/whole"]
    kept = tmp_path / "cache" / "inception-2015-12-05.pt"
    kept.write_bytes(kept.read_bytes()[:-1])  # damaged: it is fetched again
    assert features.load("inception", "cpu").title == "FID" and len(public) == 2
    assert features.load(tmp_path / "original.pt", "cpu").title == "FID"  # by its hash, whatever its name


@pytest.mark.parametrize("page", ["other", "cut", "none"])
def test_a_broken_download_leaves_nothing(public, tmp_path, monkeypatch, page):
    monkeypatch.setattr(features, "INCEPTION_URL", features.INCEPTION_URL.replace("whole", page))
    with pytest.raises(UserError, match=f"/{page} could not be fetched.*give the file with --features"):
        features.load("inception", "cpu")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_a_real_network():
    if not SQUEEZENET.exists():
        pytest.skip("the real TorchScript file is not here")
    extractor = features.load(SQUEEZENET, "cpu")
    assert (extractor.name, extractor.width) == ("squeezenet-features", 512)
    assert extractor.title == "Frechet distance (squeezenet-features)"

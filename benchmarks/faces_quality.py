"""`python benchmarks/faces_quality.py RUN` judges a run's faces beside freshly drawn and untrained ones.

Two questions. Can a classifier, trained on the drawn faces, read the labels that were asked for as well as it reads
those of fresh drawn faces? Are the samples new: how far is the nearest training image, against that of fresh faces?
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdiff import data, faces, measure, pretrained, sampling
from maskdiff.errors import UserError, run_command
from maskdiff.model import UViT
from maskdiff.precision import keep_freed_memory


class Classifier(nn.Module):
    """A small convolutional network with a head for each attribute."""

    def __init__(self, classes: tuple[int, ...], width: int = 32) -> None:
        super().__init__()
        self.classes = classes
        layers: list[nn.Module] = []
        for i, out in enumerate((width, 2 * width, 4 * width)):
            into = 3 if i == 0 else out // 2
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * width, sum(classes)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # [B, H, W, 3] uint8 -> A x [B, classes]
        return self.body(images.permute(0, 3, 1, 2).float() / 127.5 - 1).split(self.classes, dim=1)


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(tuple(int(column.max()) + 1 for column in labels.T))
    batches = epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=batches)
    for _ in range(batches):
        pick = torch.randint(len(images), (128,))
        loss = torch.stack([F.cross_entropy(out, labels[pick, a]) for a, out in enumerate(model(images[pick]))]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> list[float]:
    """The share of right answers for each attribute."""
    outs = [torch.cat(column) for column in zip(*(model(part) for part in images.split(256)), strict=True)]
    return [(out.argmax(1) == labels[:, a]).float().mean().item() for a, out in enumerate(outs)]


def nearest(images: Tensor, training: Tensor) -> Tensor:
    """Root mean square distance, in units of [0, 255], of each image to its nearest training image."""
    a, b = images.flatten(1).float(), training.flatten(1).float()
    norms = b.square().sum(1)
    squared = torch.cat([(part.square().sum(1)[:, None] - 2 * part @ b.T + norms).amin(1) for part in a.split(128)])
    return (squared.clamp(min=0) / a.shape[1]).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/faces_quality.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a run trained on faces:N or faces-b:N with labels")
    parser.add_argument("--count", type=int, default=500, help="faces of each kind (default 500)")
    parser.add_argument("--steps", type=int, default=25, help="sampler steps (default 25)")
    parser.add_argument("--epochs", type=int, default=4, help="of the classifier over the training faces (default 4)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    keep_freed_memory()
    loaded = pretrained.load_run(options.run, "ema")
    style, _, number = loaded.config.data.path.partition(":")
    if style not in faces.STYLES or not loaded.config.model.classes:
        raise UserError(f"{options.run} was not trained on labelled faces, but on {loaded.config.data.path}")
    size, first = loaded.config.model.image_size, int(number)
    packed = data.prepare(loaded.config.data.path, size, loaded.config.model.patch)
    training, labels = packed.images(packed.train_ids), packed.labels[packed.train_ids].long()
    drawn = faces.draw(style, size, faces.face_words(style, range(first, first + options.count)))
    fresh, wanted = torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1]).long()
    torch.manual_seed(loaded.config.seed)
    models = {"trained": loaded.model, "untrained": UViT(loaded.config.model)}
    judged = {"fresh faces": fresh}
    for name, model in models.items():
        judged[name] = sampling.sample(
            model, loaded.diffusion, options.count, wanted, loaded.config.guidance, options.steps, seed=1
        )
    judge = train_classifier(training, labels, options.epochs)
    result = {}
    for name, images in judged.items():
        right = accuracy(judge, images, wanted)
        distance = nearest(images, training).median().item()
        result[name] = {"accuracy": sum(right) / len(right), "nearest": distance} | dict(
            zip(packed.label_names, right, strict=True)
        )
    base = result["fresh faces"]
    print(f"{'':12}  accuracy  of fresh  nearest  of fresh  " + "  ".join(packed.label_names))
    for name, row in result.items():
        each = "  ".join(f"{row[label]:{len(label)}.2f}" for label in packed.label_names)
        print(
            f"{name:12}  {row['accuracy']:8.3f}  {row['accuracy'] / base['accuracy']:8.3f}  {row['nearest']:7.2f}  "
            f"{row['nearest'] / base['nearest']:8.3f}  {each}"
        )
    if options.json:
        about = {"machine": measure.machine(torch.device("cpu")), "commit": measure.commit()}
        about |= {"run": Path(options.run).name, "data": loaded.config.data.path}
        about |= {name: getattr(options, name) for name in ("count", "steps", "epochs")}
        options.json.write_text(json.dumps({**about, "judged": result}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)

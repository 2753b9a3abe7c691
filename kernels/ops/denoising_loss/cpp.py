"""denoising_loss by the compiled CPU library: hands pointers over."""

from maskdiff_kernels import library


def run(*arguments):
    library.cpu()


def run_backward(*arguments):
    library.cpu()

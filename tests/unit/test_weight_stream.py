"""Buckets: both ends cut alike, two are enough, and a checksum sees what changed."""

import pytest
import torch

from megatron_ztrl.engines.weight_group import WeightGroup
from megatron_ztrl.engines.weight_stream import ALONE_BYTES, Link, Piece, Staging, checksum, schedule

GROUP = WeightGroup(
    name="group",
    address="127.0.0.1",
    port=1,
    world_size=2,
    backend="gloo",
    bucket_bytes=72,
    checksums=True,
    timeout_seconds=1.0,
)


def piece(tensor, param, dim, start, shape, dtype="float32"):
    return Piece(tensor, param, dim, start, shape, dtype)


def link(order, peer, *pieces):
    return Link(order, peer, None, pieces)


CPU = torch.device("cpu")


def carry(sender, receiver, index, out, into):
    """What the network does with one bucket. Returns the blocks that arrived damaged."""
    for message, target in zip(sender.fill(index, out), receiver.receive(index, into), strict=True):
        assert message.numel() == target.numel()
        target.copy_(message)
    return receiver.write(index, into)


def test_both_ends_cut_their_pieces_into_the_same_bounded_buckets():
    ours = {"w": torch.arange(40.0).view(10, 4), "b": torch.arange(5.0)}
    theirs = {"fused": torch.zeros(20, 4), "bias": torch.zeros(9)}
    sent = link(0, 1, piece("w", "w", 0, 2, (6, 4)), piece("b", "b", 0, 0, (5,)))
    received = link(0, 0, piece("w", "fused", 0, 10, (6, 4)), piece("b", "bias", 0, 4, (5,)))
    out, into = (schedule([end], GROUP.bucket_bytes) for end in (sent, received))
    # A row is 16 bytes and each block has 8 of checksum: 3 rows; 3 rows; then the bias, 20 bytes padded to 24.
    assert [[block.rows for block in bucket.blocks] for bucket in out] == [[3], [3], [5]]
    assert [bucket.num_bytes for bucket in out] == [56, 56, 32]
    assert [bucket.payload_bytes for bucket in out] == [48, 48, 20]
    sender = Staging(GROUP, out, CPU, ours.__getitem__)
    receiver = Staging(GROUP, into, CPU, theirs.__getitem__)
    for index, (source, target) in enumerate(zip(out, into, strict=True)):
        assert not carry(sender, receiver, index, source, target).any()
    assert torch.equal(theirs["fused"][10:16], ours["w"][2:8])
    assert torch.equal(theirs["bias"][4:], ours["b"])
    assert theirs["fused"].count_nonzero() == 24


def test_a_bucket_takes_blocks_of_several_pieces():
    pieces = [piece(name, name, 0, 0, (2, 2)) for name in "abcd"]  # 16 bytes and 8 of checksum each
    buckets = schedule([link(0, 1, *pieces)], 72)
    filled = [[(block.piece.tensor, block.rows) for block in bucket.blocks] for bucket in buckets]
    assert filled == [[("a", 2), ("b", 2), ("c", 1)], [("c", 1), ("d", 2)]]
    assert all(bucket.num_bytes <= 72 for bucket in buckets)


def test_all_streams_advance_together_in_the_agreed_order():
    streams = [link(order, order, piece("w", "w", 0, 0, (6, 4))) for order in (2, 0, 1)]
    buckets = schedule(streams, GROUP.bucket_bytes)
    assert [(bucket.number, bucket.link.order) for bucket in buckets] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


def test_a_row_larger_than_a_bucket_is_refused_by_its_config_key():
    with pytest.raises(
        ValueError, match=r"publish.bucket_bytes: a row of w \(80 bytes\) does not fit into 72"
    ):
        schedule([link(0, 1, piece("w", "w", 0, 0, (2, 20)))], 72)


def test_columns_are_converted_and_keep_their_checksum_in_the_parameter():
    ours = {"w": torch.randn(4, 12)}
    theirs = {"w": torch.zeros(4, 16, dtype=torch.bfloat16)}
    for length in (4, 3):  # whole words in a row, and not
        (out,) = schedule([link(0, 1, piece("w", "w", 1, 3, (4, length), "bfloat16"))], 1000)
        (into,) = schedule([link(0, 0, piece("w", "w", 1, 5, (4, length), "bfloat16"))], 1000)
        sender = Staging(GROUP, [out], CPU, ours.__getitem__)
        receiver = Staging(GROUP, [into], CPU, theirs.__getitem__)
        assert not carry(sender, receiver, 0, out, into).any()
        assert torch.equal(theirs["w"][:, 5 : 5 + length], ours["w"][:, 3 : 3 + length].bfloat16())


def test_a_value_that_changes_on_the_way_is_seen_in_its_block():
    ours = {name: torch.randn(2, 2) for name in "ab"}
    theirs = {name: torch.zeros(2, 2) for name in "ab"}
    pieces = [piece(name, name, 0, 0, (2, 2)) for name in "ab"]
    (bucket,) = schedule([link(0, 1, *pieces)], 72)
    (message,) = Staging(GROUP, [bucket], CPU, ours.__getitem__).fill(0, bucket)
    message[bucket.blocks[1].offset] ^= 1  # one bit of the second block
    receiver = Staging(GROUP, [bucket], CPU, theirs.__getitem__)
    receiver.receive(0, bucket)[0].copy_(message)
    assert receiver.write(0, bucket).tolist() == [False, True]


def test_large_blocks_go_from_parameter_to_parameter_without_a_copy_where_they_lie_in_one_piece():
    rows = ALONE_BYTES // 4096  # of 1,024 float32
    ours = {"large": torch.randn(rows + 2, 1024), "columns": torch.randn(rows, 2048), "small": torch.randn(8)}
    theirs = {"large": torch.zeros(rows, 1024), "columns": torch.zeros(rows, 1024), "small": torch.zeros(8)}
    shapes = [("large", 0, 2, (rows, 1024)), ("columns", 1, 512, (rows, 1024)), ("small", 0, 0, (8,))]
    out_pieces = [piece(name, name, dim, start, shape) for name, dim, start, shape in shapes]
    into_pieces = [piece(name, name, dim, 0, shape) for name, dim, _, shape in shapes]
    (out,) = schedule([link(0, 1, *out_pieces)], 1 << 20)
    (into,) = schedule([link(0, 0, *into_pieces)], 1 << 20)
    sender = Staging(GROUP, [out], CPU, ours.__getitem__)
    receiver = Staging(GROUP, [into], CPU, theirs.__getitem__)
    large, columns, packed = sender.fill(0, out)
    assert large.data_ptr() == ours["large"][2:].data_ptr()
    assert torch.equal(columns, ours["columns"][:, 512:1536])
    targets = receiver.receive(0, into)
    assert [target.data_ptr() for target in targets[:2]] == [
        theirs["large"].data_ptr(),
        theirs["columns"].data_ptr(),
    ]
    assert packed.numel() == 32 + 3 * 8
    assert not carry(sender, receiver, 0, out, into).any()
    assert torch.equal(theirs["large"], ours["large"][2:])
    assert torch.equal(theirs["columns"], ours["columns"][:, 512:1536])
    assert torch.equal(theirs["small"], ours["small"])
    # An end that converts stages the same message.
    halves = {name: value.bfloat16() for name, value in ours.items()}
    widening = Staging(GROUP, [out], CPU, halves.__getitem__)
    assert not carry(widening, receiver, 0, out, into).any()
    assert torch.equal(theirs["large"], halves["large"][2:].float())


def test_a_checksum_is_the_sum_of_the_words_wherever_they_lie():
    block = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).view(torch.float32)
    words = [1 + (2 << 32), 3 + (4 << 32)]
    assert checksum(block).item() == sum(words)
    wide = torch.zeros(2, 5)
    wide[:, 1:3] = block
    assert checksum(wide[:, 1:3]).item() == sum(words)  # starts in the middle of a word
    assert checksum(block[:, :1]).item() == 1 + 3  # too narrow for 8-byte words


def test_a_parameter_of_another_shape_than_planned_is_refused_by_name():
    part = piece("w", "fused", 0, 2, (4, 8))
    part.of(torch.zeros(6, 8))
    for shape in ((5, 8), (6, 9), (6,), (6, 8, 1)):
        with pytest.raises(
            ValueError, match=r"w: fused has shape .* does not hold \[2:6\] along dimension 0"
        ):
            part.of(torch.zeros(shape))

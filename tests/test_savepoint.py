"""What is put back is what was there, in the same tensors; the copies' memory stays."""

import torch

from templora.savepoint import Savepoint


def test_tensors_are_put_back_bit_for_bit_in_memory_that_stays() -> None:
    savepoint, tensors = Savepoint(), [torch.randn(5, 3), torch.zeros(()), torch.arange(4)]
    places = list[list[int]]()
    for _ in range(2):
        before = [tensor.clone() for tensor in tensors]
        savepoint.take(tensors)
        for tensor in tensors:
            tensor.add_(1)
        assert all(torch.equal(a, b) for a, b in zip(savepoint.copies, before, strict=True))
        savepoint.put_back()
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        savepoint.done()
        places.append([copy.data_ptr() for copy in savepoint.copies])
        tensors[0].normal_()
    assert places[0] == places[1]


def test_other_tensors_may_come_the_next_time() -> None:
    savepoint = Savepoint()
    savepoint.take([torch.ones(3)])
    other = [torch.ones(2), torch.zeros(2, 2)]
    savepoint.take(other)
    other[1].fill_(7)
    savepoint.put_back()
    assert torch.equal(other[1], torch.zeros(2, 2))

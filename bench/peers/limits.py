"""What the machine can do: the memory's bandwidth, the cores' multiply-adds."""

import functools

import numpy as np

from bench import limits
from bench.peers.registry import peer


@peer("value", "bare read")
def bare_read(x):
    return functools.partial(limits.read, limits.words_of(x))


@peer("value_and_grad", "bare copy")
@peer("accumulate", "bare copy")
@peer("prox", "bare copy")
def bare_copy(x):
    words = limits.words_of(x)
    return functools.partial(limits.copy, words, np.zeros_like(words))


@peer("gram", "peak FMA")
def peak_half_gram(x):
    n, d = x.shape
    return limits.multiply_adds(n * (n - 1) / 2 * d)


@peer("gram_and_grad", "peak FMA")
def peak_gram_and_grad(x):
    n, d = x.shape  # half the Gram matrix, and the product of its signs with x
    return limits.multiply_adds(n * (n - 1) / 2 * d * 3)

"""Prefill attention on Hopper in Gluon, Triton's language below Triton: warps with roles.

Of the warps of a program two groups of four compute, each its own rows, and two single warps feed
them: one copies keys (and query rows) into shared memory, the other values (`producer.py`). Copies
and products are asynchronous, so a group's softmax overlaps with its own products and with the
other group's (`consumer.py`). Barriers in shared memory say what is full and what is empty
(`memory.py`). A program stays on its processor and takes every n-th item of work (`work.py`).
"""

"""Official StyleGAN2-ADA (PyTorch) checkpoints, read without executing anything in them.

pickled.py    a pickle as data: plain values and records of what it wanted to be called
source.py     a static look at the embedded Python source
persisted.py  the records as persisted objects and tensors
convert.py    `read_official`: configuration, cross-checks, networks
"""

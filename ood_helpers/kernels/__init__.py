"""What scoring spends its time in, one file a kernel: the formula, the Triton kernel, its launcher, the torch reference
that also serves the CPU, and one function that takes the one or the other.

A function takes float32 on CUDA to Triton and everything else to the torch reference, in the dtype it is given; so it takes
rows of more than 16,384 features whose largest entries are looked for.
Triton multiplies in full float32 ("ieee") unless "tf32" is asked for. All block sizes are fixed, not tuned at run time, so
the same input gives the same bits in every run on a machine.

What has no kernel: the selection of KNN, see kth_cosine. UMAP's masks, which are kept while their scores stay and then cost
6 % of a pass (benchmarks/bench_masks.py, on the CPU); with 21 % of a training step they may be worth one on a GPU. DFB's
Gaussian masks, one product of small matrices for each map beside the passes at four scales that make it.
"""

"""What scoring spends its time in, one file a kernel: the formula, the Triton kernel, its launcher, the torch reference
that also serves the CPU, and one function that takes the one or the other.

A function takes float32 on CUDA to Triton and everything else to the torch reference, in the dtype it is given.
Triton multiplies in full float32 ("ieee") unless "tf32" is asked for. All block sizes are fixed, not tuned at run time, so
the same input gives the same bits in every run on a machine.

What has no kernel: the selection of KNN, see kth_cosine. UMAP's masks, which cost 6 % of a pass (they are kept) and 21 % of a
training step (benchmarks/bench_masks.py, on the CPU). DFB's Gaussian masks, one matrix product for all maps beside passes
at four scales (benchmarks/bench_cam.py).
"""

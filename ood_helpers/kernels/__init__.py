"""What scoring spends its time in, one file per kernel: the formula, the Triton kernel, its launcher, the torch reference
used on the CPU, and a function that chooses between the two.

float32 on CUDA goes to Triton. Everything else goes to the torch reference, in its own dtype, and so do rows of more than
16,384 features whose largest entries are looked for. Triton multiplies in full float32 ("ieee") unless "tf32" is asked for.
Block sizes are fixed, not tuned at run time: the same input gives the same bits in every run on a machine.

Without a kernel: the selection of KNN, see kth_cosine; UMAP's masks, 6 % of a pass and 21 % of a training step on the CPU
(benchmarks/bench_masks.py); DFB's Gaussian masks, one small product per map beside the four passes that make it.
"""

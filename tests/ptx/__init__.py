"""
Runs the machine-independent code (PTX) that Triton makes of a kernel for a GPU, on the CPU.

Triton's interpreter runs a kernel's Python; what the compiler makes of it, where each element lies, what goes through
shared memory and when, which product a tensor core takes, it does not see. Here it is run, and watched: every access
to memory lies within a tensor that the kernel was given, and no thread reads what another warp wrote without a barrier
between them. Time it says nothing of.

- `parse`, `writer`, `program`: PTX as Python, an operation of numpy for each instruction.
- `block`, `races`, `tensor_memory`: the threads of a block, with shared memory and tensor cores.
- `launch`, `memory`: compiles a kernel as for the GPU, and runs a grid of blocks on the tensors that it was given.
"""

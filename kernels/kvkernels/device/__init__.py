"""GPUs behind one port: CUDA, and an emulation in host memory that always says that it is one. See kernels/DEVICE.md.

port.py        what a device is, its errors; no device is needed to import it
emulation.py   memory in memfds, streams as threads, the compiled kernels on a processor
cuda.py        the driver, by way of driver.py; CuPy compiles the kernels
engines.py     three ways to copy, chosen by what a calibration has measured
pinning.py     arenas registered in the background, and a bounce buffer meanwhile
pages.py       where an engine's pages lie; paged.py  blocks out of them and into them, raw, encoded, in planes
"""

"""C++ for the CPU behind a plain C interface, loaded with ctypes."""

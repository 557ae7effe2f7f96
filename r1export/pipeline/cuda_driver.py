"""What NVIDIA's driver says about its devices, asked without torch."""

from __future__ import annotations

import ctypes
import platform

LIBRARY = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
NAME_BYTES = 256


def device_name() -> str | None:
    """The name of the first CUDA device; None without a driver or a device.

    Source: CUDA Driver API, cuInit, cuDeviceGet and cuDeviceGetName; all of them return 0 for success.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    return None if driver.cuDeviceGetName(name, NAME_BYTES, device) else name.value.decode("utf-8", "replace")

"""The types of driver.py, compared with the toolkit's cuda.h: nothing here needs a driver."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from kvkernels.device import driver as cu

INCLUDES: Final = [path for path in (Path("/usr/local/cuda/include"), *Path("/usr/local").glob("cuda-*/include"))
                   if (path / "cuda.h").exists()]  # fmt: skip
PROGRAM: Final = """
#include <cstdio>
#include <cstddef>
#include <cuda.h>
template <typename R, typename... A> void say(const char *name, R (*)(A...)) {{
    std::printf("%s", name);
    (std::printf(" %zu", sizeof(A)), ...);
    std::printf("\\n");
}}
// As the library exports it, whatever name the header gives the newest one.
int main() {{
{calls}
{sizes}
{numbers}
}}
"""
STRUCTURES: Final = {
    "CUipcMemHandle": cu.IpcHandle, "CUmemLocation": cu.Location, "CUmemAllocationProp": cu.AllocationProperties,
    "CUmemAccessDesc": cu.Access, "CUmemcpyAttributes": cu.CopyAttributes, "CUuuid": cu.Uuid,
}  # fmt: skip
NUMBERS: Final = {
    "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": cu.MULTIPROCESSORS,
    "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": cu.VIRTUAL_MEMORY,
    "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": cu.DESCRIPTOR_HANDLES,
    "CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED": cu.READ_ONLY_REGISTRATION,
    "CU_POINTER_ATTRIBUTE_MEMORY_TYPE": cu.POINTER_MEMORY_TYPE,
    "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": cu.POINTER_DEVICE,
    "CU_MEMORYTYPE_DEVICE": cu.DEVICE_MEMORY,
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": cu.CAPTURE_THREAD_LOCAL,
    "CU_STREAM_NON_BLOCKING": cu.STREAM_NON_BLOCKING,
    "CU_EVENT_BLOCKING_SYNC": cu.EVENT_BLOCKING_SYNC,
    "CU_EVENT_DISABLE_TIMING": cu.EVENT_DISABLE_TIMING,
    "CU_MEMHOSTREGISTER_PORTABLE": cu.REGISTER_PORTABLE,
    "CU_MEMHOSTREGISTER_DEVICEMAP": cu.REGISTER_DEVICE_MAP,
    "CU_MEMHOSTREGISTER_READ_ONLY": cu.REGISTER_READ_ONLY,
    "CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS": cu.IPC_LAZY_PEER_ACCESS,
    "CU_MEM_ALLOCATION_TYPE_PINNED": cu.PINNED,
    "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": cu.POSIX_DESCRIPTOR,
    "CU_MEM_LOCATION_TYPE_DEVICE": cu.ON_DEVICE,
    "CU_MEM_ACCESS_FLAGS_PROT_READWRITE": cu.READ_WRITE,
    "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": cu.IN_STREAM_ORDER,
    "CUDA_ERROR_OUT_OF_MEMORY": cu.OUT_OF_MEMORY,
    "CUDA_ERROR_NOT_READY": cu.NOT_READY,
}
FIELDS: Final = {
    "CUmemAllocationProp": ("requestedHandleTypes", "location", "win32HandleMetaData", "allocFlags"),
    "CUmemcpyAttributes": ("srcAccessOrder", "srcLocHint", "dstLocHint", "flags"),
    "CUmemAccessDesc": ("location", "flags"),
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What cuda.h says: sizes of a call's arguments, of a structure and its fields' offsets, numbers."""
    if not INCLUDES or shutil.which("g++") is None:
        pytest.skip("cuda.h or g++ is not there")
    names = [*cu.SIGNATURES, cu.BATCH_V2]
    program = PROGRAM.format(
        calls="\n".join(f'say("{name}", &{name});' for name in names),
        sizes="\n".join(
            f'std::printf("{name} %zu' + " %zu" * len(FIELDS.get(name, ())) + f'\\n", sizeof({name})'
            + "".join(f", offsetof({name}, {field})" for field in FIELDS.get(name, ())) + ");"
            for name in STRUCTURES
        ),
        numbers="\n".join(f'std::printf("{name} %d\\n", (int){name});' for name in NUMBERS),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("header")
    source = folder / "ask.cpp"
    source.write_text(program)
    # Only addresses of functions are taken, so nothing has to be there to link with.
    stubs = folder / "stubs.c"
    stubs.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in names))
    objects = [folder / "ask.o", folder / "stubs.o"]
    subprocess.run(
        ["g++", "-std=c++17", f"-I{INCLUDES[0]}", "-Wno-deprecated-declarations", "-c", source, "-o", objects[0]],
        check=True,
    )
    subprocess.run(["gcc", "-c", stubs, "-o", objects[1]], check=True)
    subprocess.run(["g++", *objects, "-o", folder / "ask"], check=True)
    said = subprocess.run([folder / "ask"], check=True, capture_output=True, text=True).stdout
    return {name: [int(each) for each in rest] for name, *rest in map(str.split, said.splitlines())}


@pytest.mark.parametrize("name", [*cu.SIGNATURES, cu.BATCH_V2])
def test_a_call_has_the_arguments_of_the_header(header: dict[str, list[int]], name: str) -> None:
    types = cu.SIGNATURES.get(name) or cu.BATCH_SIGNATURES[name]
    assert [ctypes.sizeof(each) for each in types] == header[name]


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_is_laid_out_as_in_the_header(header: dict[str, list[int]], name: str) -> None:
    ours = STRUCTURES[name]
    offsets = [getattr(ours, field).offset for field in FIELDS.get(name, ())]
    assert [ctypes.sizeof(ours), *offsets] == header[name]


def test_numbers_are_those_of_the_header(header: dict[str, list[int]]) -> None:
    assert {name: header[name] for name in NUMBERS} == {name: [number] for name, number in NUMBERS.items()}

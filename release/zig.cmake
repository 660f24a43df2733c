# Compiles for Linux with glibc 2.28 on KVZIP_ARCH (x86_64, aarch64), whatever this machine is, by zig's clang:
# release/wheels.py makes the two programs zig-cc and zig-c++ in the folder KVZIP_ZIG.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $ENV{KVZIP_ARCH})
set(CMAKE_C_COMPILER $ENV{KVZIP_ZIG}/zig-cc)
set(CMAKE_CXX_COMPILER $ENV{KVZIP_ZIG}/zig-c++)
set(CMAKE_AR $ENV{KVZIP_ZIG}/zig-ar)
set(CMAKE_RANLIB $ENV{KVZIP_ZIG}/zig-ranlib)
set(CMAKE_CROSSCOMPILING TRUE)
# nanobind 3.1 uses stderr and leaves it to the C++ library to have included this; zig's does not.
set(CMAKE_CXX_FLAGS_INIT "-include cstdio")

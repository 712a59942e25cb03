# Toolchain file: the C++ tests for 64-bit ARM, compiled on another machine and run by qemu's user mode. `make test-arm`
# uses it. On Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64;-L;/usr/aarch64-linux-gnu)
# qemu has no room for the shadow memory of AddressSanitizer.
set(SCAN_FAST_SANITIZE OFF CACHE BOOL "Compile with AddressSanitizer and UndefinedBehaviorSanitizer")

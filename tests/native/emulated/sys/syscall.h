// A program whose AMX is emulated is always allowed to use it.
#pragma once
#include_next <sys/syscall.h>
#undef SYS_arch_prctl
#define SYS_arch_prctl SYS_sched_yield

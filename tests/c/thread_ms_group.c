/* The same threads where ThreadSanitizer watches (`python tests/check.py tsan`). */
#include "test_ms_group_threads.c"

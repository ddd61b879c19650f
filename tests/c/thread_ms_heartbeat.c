/* The same tests where ThreadSanitizer watches (`python tests/check.py tsan`). */
#include "test_ms_heartbeat.c"

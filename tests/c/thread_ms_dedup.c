/* The same tests where ThreadSanitizer watches (`python tests/check.py tsan`): those of threads, no
 * schedules. The core has no yield points here. */
#define MS_SCHEDULER
#include "test_ms_dedup.c"

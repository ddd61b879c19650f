/* Statuses as data, and the one place that formats a failure. */
#include "ms_status.h"

#include <stdarg.h>
#include <stdio.h>

const ms_status_row *ms_status_rows(void) {
#define ROW(name, value, class_name, text) {(value), #name, class_name, text},
  static const ms_status_row rows[] = {MS_STATUS_MAP(ROW){0, NULL, NULL, NULL}};
#undef ROW
  return rows;
}

ms_status ms_fail(ms_error *err, ms_status status, uint64_t position, uint64_t expected,
                  uint64_t found, const char *format, ...) {
  if (err == NULL) return status;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(err->text, sizeof err->text, format, arguments);
  va_end(arguments);
  err->position = position;
  err->expected = expected;
  err->found = found;
  return status;
}

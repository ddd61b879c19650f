/* The table that lets a test hold docs/format.md to what the compiler did. */
#include "ms_format.h"

#define ROW(type, field, at) {#type, #field, (at), (uint32_t)sizeof(((type *)0)->field)},

const ms_format_field *ms_format_fields(void) {
  static const ms_format_field fields[] = {MS_FORMAT_FIELDS(ROW){NULL, NULL, 0, 0}};
  return fields;
}

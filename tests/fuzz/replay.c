/* Runs a harness on the files that are named: what there is without libFuzzer. */
#include "fuzz.h"

#include <stdio.h>

int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    FILE *file = fopen(argv[i], "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) return 2;
    size_t size = (size_t)ftell(file);
    uint8_t *data = malloc(size); /* of the exact size, so that ASan sees one byte too many */
    rewind(file);
    if (fread(data, 1, size, file) != size) return 2;
    fprintf(stderr, "%s\n", argv[i]);
    LLVMFuzzerTestOneInput(data, size);
    free(data);
    fclose(file);
  }
  return 0;
}

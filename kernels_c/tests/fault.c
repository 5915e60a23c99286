/* One fault of each kind, on demand: shows that a sanitizer build ends at the first one. Not a test by itself. */
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int g_shared;

static void *write_shared(void *arg) {
  (void)arg;
  for (int i = 0; i < 1000; i++) g_shared++;
  return NULL;
}

int main(int argc, char **argv) {
  const char *kind = argc > 1 ? argv[1] : "";
  if (strcmp(kind, "freed") == 0) {
    volatile char *volatile bytes = malloc(16);
    free((void *)bytes);
    if (bytes) bytes[3] = 1;
  } else if (strcmp(kind, "overflow") == 0) {
    volatile int most = INT_MAX;
    most = most + argc;
  } else if (strcmp(kind, "race") == 0) {
    pthread_t one, two;
    if (pthread_create(&one, NULL, write_shared, NULL) || pthread_create(&two, NULL, write_shared, NULL)) return 0;
    pthread_join(one, NULL);
    pthread_join(two, NULL);
  }
  puts("went on");
  return 0;
}

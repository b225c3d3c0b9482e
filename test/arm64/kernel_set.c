/* kernel_set.c — prints the name of the kernel set that the CPU backend picks on this processor. */
#include <stdio.h>

#include "../../native/include/caravan.h"

int main(void) {
    puts(cv_cpu_name(cv_cpu_best()));
    return 0;
}

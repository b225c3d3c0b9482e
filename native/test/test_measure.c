/* test_measure.c — the machine's ceilings are positive and wrong arguments are refused. */
#include "../include/caravan.h"
#include "check.h"

int main(void) {
    cv_checks c = {0};
    double rate = 0;
    cv_case(&c, "read bandwidth is measured for every number of threads");
    for (uint32_t n = 1; n <= 3; n++) {
        rate = 0;
        cv_check(&c, !cv_measure_bandwidth(8u << 20, n, &rate) && rate > 1e6, "%u threads: %g bytes a second", n, rate);
    }
    cv_check(&c, cv_measure_bandwidth(100, 1, &rate) == CV_E_ARGUMENT, "a buffer of 100 bytes");
    cv_check(&c, cv_measure_bandwidth(1u << 20, 0, &rate) == CV_E_ARGUMENT, "no threads");
    cv_check(&c, cv_measure_bandwidth(1u << 20, 1, NULL) == CV_E_ARGUMENT, "nowhere to put it");
    cv_end_case(&c);
    cv_case(&c, "int8 multiply-adds are measured for the best kernel set and refused for sets without them");
    int code = cv_measure_int8(0, 2, &rate);
    cv_check(&c, code == CV_E_UNSUPPORTED || (!code && rate > 1e8), "%d, %g a second", code, rate);
    cv_check(&c, (code == CV_E_UNSUPPORTED) == (cv_cpu_best() == CV_CPU_SCALAR), "%d for %s", code, cv_cpu_name(cv_cpu_best()));
    cv_check(&c, cv_measure_int8(CV_CPU_SCALAR, 1, &rate) == CV_E_UNSUPPORTED, "scalar code has no int8 instruction");
    cv_check(&c, cv_measure_int8(0, 0, &rate) == CV_E_ARGUMENT, "no threads");
    cv_end_case(&c);
    return cv_report(&c);
}

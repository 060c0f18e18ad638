/* What fan-out costs when nothing but send() is done: the yardstick of the fan-out scenario.
 *
 * Sends `length` bytes to each of `count` sockets, `rounds` times, a round each `interval_ns`. Returns the processor
 * time of the calling thread in nanoseconds, or -1 with errno. A full socket is waited for, as a server would. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

static long long nanoseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (long long)now.tv_sec * 1000000000LL + now.tv_nsec;
}

long long send_rounds(const int *sockets, int count, const char *bytes, long length, int rounds, long long interval_ns)
{
    long long cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    long long due = nanoseconds(CLOCK_MONOTONIC);
    for (int round = 0; round < rounds; round++) {
        struct timespec until = {due / 1000000000LL, due % 1000000000LL};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0) == EINTR)
            ;
        for (int place = 0; place < count; place++) {
            long sent = 0;
            while (sent < length) {
                long more = send(sockets[place], bytes + sent, length - sent, MSG_NOSIGNAL);
                if (more > 0) {
                    sent += more;
                } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
                    struct pollfd writable = {sockets[place], POLLOUT, 0};
                    poll(&writable, 1, 1000);
                } else if (errno != EINTR) {
                    return -1;
                }
            }
        }
        due += interval_ns;
    }
    return nanoseconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
}

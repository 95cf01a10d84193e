/* A long line between two hosts, for measurements on one machine: a kernel without netem has nothing else that delays.
 *
 *     line [--rtt MS] [--window KIB] [--rate MBIT] [--reset-every SECONDS [--reset-from MIB]] [--memory MIB] [--count FILE]
 *          LISTEN:PORT=TARGET:PORT...
 *
 * Forwards TCP connections (IPv4) to targets on this machine. 0 is no limit.
 *
 *   --rtt          A byte leaves half of it after it came. A connection reaches its target after one and a half, as the last of the
 *                  three segments that open a connection does: who connects was told at once that it is open, and what it then
 *                  says arrives when it would have.
 *   --window       What one connection may have under way in one direction: given to the line, and its acknowledgement not back.
 *   --rate         What all connections together may carry in one direction. A connection that wants more than its share gets its share.
 *   --reset-every  Ends one connection with an RST at both ends, each time the next one in the order in which they came.
 *   --reset-from   The first time is so long after so much was handed on forward.
 *   --memory       What is kept of all connections at most. Those that have more than a little wait then; --count tells how often.
 *   --count        Appends, 20 times a second, a line: monotonic seconds, for each pair the bytes that were handed on forward and
 *                  back, then how often a connection was reset, and how often one waited for memory.
 *
 * Where nobody listens at the target, nobody listens here: who connects is refused, and not accepted and then cut off.
 * Prints "ready" once it looks after its pairs. One thread; ends on SIGTERM. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    CHUNK = 256 << 10,
    /* The most that is read or written in one call, and that one connection gets before the next one has its turn. */
    TURN = 4 * CHUNK,
    /* What every connection may keep, however little memory is left: bulk must not silence the others. */
    LITTLE = CHUNK,
    /* With a limit, what waits for its turn shall wait at its sender, and not in buffers that a real line does not have. */
    WAITING = 256 << 10,
};

static const int64_t MS = 1000000, NEVER = INT64_MAX;
/* A thread that runs late makes good so much of the line's time: else the rate would depend on the scheduler. */
static const int64_t BURST = 10 * MS;

enum way { FORWARD, BACK };

struct chunk {
    struct chunk *next;
    char bytes[CHUNK];
};

/* All bytes up to this count have the same time. */
struct mark {
    int64_t time;
    uint64_t end;
};

/* A queue of them. */
struct marks {
    struct mark *ring;
    size_t first, count, room;
};

/* One direction of a connection. */
struct flow {
    struct connection *connection;
    int from, to;
    enum way way;
    bool readable, writable;
    bool ended; /* nothing more comes */
    bool aborted; /* it ended with an RST */
    bool told; /* the receiver knows the end */
    bool starved;
    struct chunk *head, *tail;
    size_t at, fill; /* where the first chunk begins, where the last one ends */
    uint64_t taken, due, passed, acknowledged; /* bytes so far: read, whose time has come, handed on, known to have arrived */
    int64_t end; /* when the end leaves */
    struct marks departures, acknowledgements;
};

struct pair {
    struct sockaddr_in near, far;
    int ear; /* -1 as long as nobody listens at the far end */
    uint64_t carried[2];
};

enum state { ON_ITS_WAY, CONNECTING, OPEN };

struct connection {
    struct connection *next;
    struct pair *pair;
    uint64_t number;
    enum state state;
    int near, far;
    int64_t arrival; /* when it reaches its target */
    int64_t abort; /* when it ends with an RST */
    struct flow flows[2];
};

static int64_t delay, every, idle_until;
static uint64_t window, reset_from, most = (uint64_t)1 << 30, kept, numbers, last_reset, resets, starvations;
static double rate; /* bytes in a nanosecond */
static bool somebody_waits;
static int64_t line_free[2];
static unsigned turn[2];
static struct pair *pairs;
static size_t pair_count;
static struct connection *connections;
static size_t connection_count;
static struct chunk *spare;
static int poller;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000 * MS + time.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void *must(void *memory) {
    if (!memory) fail("line");
    return memory;
}

/* Wakes the thread then. */
static void by(int64_t time) {
    if (time < idle_until) idle_until = time;
}

/* Memory */

/* Chunks are used again: memory that was touched a moment ago is warm. */
static struct chunk *new_chunk(void) {
    struct chunk *chunk = spare;
    if (chunk) spare = chunk->next;
    else chunk = must(malloc(sizeof *chunk));
    chunk->next = NULL;
    kept += CHUNK;
    return chunk;
}

static void free_chunk(struct chunk *chunk) {
    chunk->next = spare;
    spare = chunk;
    kept -= CHUNK;
}

static void add(struct marks *marks, int64_t time, uint64_t end) {
    if (marks->count) {
        struct mark *last = &marks->ring[(marks->first + marks->count - 1) % marks->room];
        /* Nobody could tell them apart; and many small pieces must not need more memory than their bytes. */
        if (time - last->time < 10000) {
            last->end = end;
            return;
        }
    }
    if (marks->count == marks->room) {
        size_t room = marks->room ? 2 * marks->room : 64;
        struct mark *ring = must(malloc(room * sizeof *ring));
        for (size_t i = 0; i < marks->count; i++) ring[i] = marks->ring[(marks->first + i) % marks->room];
        free(marks->ring);
        *marks = (struct marks){ring, 0, marks->count, room};
    }
    marks->ring[(marks->first + marks->count++) % marks->room] = (struct mark){time, end};
}

/* Moves a count on to the marks whose time has come, and wakes the thread for the next one. */
static void reach(struct marks *marks, int64_t time, uint64_t *count) {
    while (marks->count && marks->ring[marks->first].time <= time) {
        *count = marks->ring[marks->first].end;
        marks->first = (marks->first + 1) % marks->room;
        marks->count--;
    }
    if (marks->count) by(marks->ring[marks->first].time);
}

/* Connections */

static void tune(int socket) {
    int one = 1, size = WAITING;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (window || rate > 0) setsockopt(socket, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
}

/* `reader` is the flow that reads from the socket. */
static void watch(int socket, struct flow *reader) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u64 = (uintptr_t)reader};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, socket, &event)) fail("epoll_ctl");
}

static void empty(struct flow *flow) {
    while (flow->head) {
        struct chunk *chunk = flow->head;
        flow->head = chunk->next;
        free_chunk(chunk);
    }
    free(flow->departures.ring);
    free(flow->acknowledgements.ring);
}

static void close_socket(int socket, bool abortively) {
    if (socket < 0) return;
    struct linger linger = {1, 0};
    if (abortively) setsockopt(socket, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close(socket);
}

static void drop(struct connection **place, bool abortively) {
    struct connection *connection = *place;
    *place = connection->next;
    close_socket(connection->near, abortively);
    close_socket(connection->far, abortively);
    empty(&connection->flows[FORWARD]);
    empty(&connection->flows[BACK]);
    free(connection);
    connection_count--;
}

static void accept_all(struct pair *pair, int64_t time) {
    int near;
    while ((near = accept4(pair->ear, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        tune(near);
        struct connection *connection = must(calloc(1, sizeof *connection)), **last = &connections;
        *connection = (struct connection){
            .pair = pair, .number = ++numbers, .near = near, .far = -1, .arrival = time + 3 * delay, .abort = NEVER};
        connection->flows[FORWARD] = (struct flow){.connection = connection, .from = near, .to = -1, .way = FORWARD};
        connection->flows[BACK] = (struct flow){.connection = connection, .from = -1, .to = near, .way = BACK};
        while (*last) last = &(*last)->next;
        *last = connection;
        connection_count++;
        watch(near, &connection->flows[FORWARD]);
    }
}

static bool dial(struct connection *connection) {
    int far = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (far < 0) return false;
    tune(far);
    connection->far = connection->flows[FORWARD].to = connection->flows[BACK].from = far;
    connection->state = CONNECTING;
    if (connect(far, (void *)&connection->pair->far, sizeof connection->pair->far) && errno != EINPROGRESS) return false;
    watch(far, &connection->flows[BACK]);
    return true;
}

/* False when the target does not want it. */
static bool has_reached(struct connection *connection) {
    int error = 0;
    socklen_t size = sizeof error;
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    if (getsockopt(connection->far, SOL_SOCKET, SO_ERROR, &error, &size) || error) return false;
    if (getpeername(connection->far, (void *)&peer, &length) == 0) connection->state = OPEN;
    return true;
}

/* The way of the bytes */

/* How much of a flow may be read now. */
static uint64_t room_of(struct flow *flow) {
    uint64_t room = TURN;
    if (!flow->readable || flow->ended) return 0;
    if (window) {
        uint64_t held = flow->taken - flow->acknowledged;
        if (held >= window) return 0;
        if (window - held < room) room = window - held;
    }
    /* A receiver that does not take what has arrived closes its window. Else a sender could believe that everything is there. */
    if (flow->due - flow->passed > TURN) {
        somebody_waits = true;
        return 0;
    }
    bool starved = kept + TURN > most && flow->taken - flow->passed >= LITTLE;
    if (starved && !flow->starved) starvations++;
    flow->starved = starved;
    somebody_waits |= starved;
    return starved ? 0 : room;
}

static void has_ended(struct flow *flow, int64_t time, bool abortively) {
    struct marks *marks = &flow->departures;
    flow->readable = false;
    flow->ended = true;
    flow->aborted = abortively;
    flow->end = time + delay;
    /* Behind the last byte, which may wait for the line. */
    if (marks->count) {
        int64_t last = marks->ring[(marks->first + marks->count - 1) % marks->room].time;
        if (last > flow->end) flow->end = last;
    }
}

/* Reads at most so much; false when nothing came. */
static bool take(struct flow *flow, uint64_t room) {
    struct iovec pieces[TURN / CHUNK + 1];
    struct chunk *fresh = NULL, **link = &fresh;
    int count = 0;
    uint64_t left = room;
    if (flow->tail && flow->fill < CHUNK) {
        uint64_t size = CHUNK - flow->fill < left ? CHUNK - flow->fill : left;
        pieces[count++] = (struct iovec){flow->tail->bytes + flow->fill, size};
        left -= size;
    }
    while (left) {
        uint64_t size = left < CHUNK ? left : CHUNK;
        *link = new_chunk();
        pieces[count++] = (struct iovec){(*link)->bytes, size};
        left -= size;
        link = &(*link)->next;
    }
    ssize_t got = readv(flow->from, pieces, count);
    int error = errno;
    int64_t time = now();

    uint64_t rest = got > 0 ? (uint64_t)got : 0;
    if (flow->tail && flow->fill < CHUNK) {
        uint64_t size = CHUNK - flow->fill < rest ? CHUNK - flow->fill : rest;
        flow->fill += size;
        rest -= size;
    }
    while (fresh) {
        struct chunk *chunk = fresh;
        fresh = chunk->next;
        if (!rest) {
            free_chunk(chunk);
            continue;
        }
        chunk->next = NULL;
        if (flow->tail) flow->tail->next = chunk;
        else flow->head = chunk;
        flow->tail = chunk;
        flow->fill = rest < CHUNK ? rest : CHUNK;
        rest -= flow->fill;
    }

    if (got < 0 && error == EINTR) return true;
    if (got < 0 && error == EAGAIN) flow->readable = false;
    else if (got <= 0) has_ended(flow, time, got < 0);
    if (got <= 0) return false;
    flow->taken += (uint64_t)got;
    int64_t leaves = time;
    if (rate > 0) {
        int64_t *free_at = &line_free[flow->way];
        if (*free_at < time - BURST) *free_at = time - BURST;
        *free_at += (int64_t)((double)got / rate);
        if (*free_at > leaves) leaves = *free_at;
    }
    add(&flow->departures, leaves + delay, flow->taken);
    return true;
}

/* Reads from everyone, each in its turn; with a rate as long as the line is free. */
static void take_all(enum way way) {
    if (!connection_count) return;
    uint64_t share = TURN;
    if (rate > 0) {
        /* A millisecond of the line: the others hardly notice, and it is not too many wake-ups. */
        share = (uint64_t)(rate * (double)MS);
        if (share < 4096) share = 4096;
        if (share > TURN) share = TURN;
    }
    struct connection *connection = connections;
    for (unsigned i = turn[way] % connection_count; i; i--) connection = connection->next;
    bool progress = false;
    /* So many have had no turn since something was read. */
    for (unsigned idle = 0; idle < connection_count;) {
        if (rate > 0 && line_free[way] > now()) {
            for (connection = connections; connection; connection = connection->next)
                if (room_of(&connection->flows[way])) by(line_free[way]);
            return;
        }
        struct flow *flow = &connection->flows[way];
        uint64_t room = room_of(flow);
        bool has_read = room && take(flow, room < share ? room : share);
        progress |= has_read;
        /* Without a rate once around is enough: what was read is handed on before there is more. */
        idle = rate > 0 && has_read ? 0 : idle + 1;
        turn[way] = (turn[way] + 1) % (unsigned)connection_count;
        connection = connection->next ? connection->next : connections;
    }
    if (progress) by(0);
}

/* What was handed on is kept no longer. */
static void forget(struct flow *flow, size_t bytes) {
    while (bytes) {
        size_t size = CHUNK - flow->at < bytes ? CHUNK - flow->at : bytes;
        flow->at += size;
        bytes -= size;
        if (flow->at < CHUNK && flow->passed < flow->taken) return;
        struct chunk *chunk = flow->head;
        flow->head = chunk->next;
        flow->at = 0;
        if (!flow->head) flow->tail = NULL;
        free_chunk(chunk);
    }
}

/* Hands on what is due; false when the receiver is gone. */
static bool give(struct flow *flow, struct pair *pair) {
    int64_t time = now();
    reach(&flow->departures, time, &flow->due);
    while (flow->writable && flow->passed < flow->due) {
        struct iovec pieces[TURN / CHUNK + 1];
        size_t count = 0, at = flow->at;
        uint64_t left = flow->due - flow->passed;
        for (struct chunk *chunk = flow->head; left && count < TURN / CHUNK + 1; chunk = chunk->next) {
            uint64_t size = CHUNK - at < left ? CHUNK - at : left;
            pieces[count++] = (struct iovec){chunk->bytes + at, size};
            left -= size;
            at = 0;
        }
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
        ssize_t sent = sendmsg(flow->to, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0) {
            flow->writable = false;
            return errno == EAGAIN;
        }
        flow->passed += (uint64_t)sent;
        pair->carried[flow->way] += (uint64_t)sent;
        forget(flow, (size_t)sent);
        if (somebody_waits) by(0);
        if (window) add(&flow->acknowledgements, time + delay, flow->passed);
        else flow->acknowledged = flow->passed;
    }
    if (!window) return true;
    uint64_t before = flow->acknowledged;
    reach(&flow->acknowledgements, time, &flow->acknowledged);
    /* There is room again. */
    if (flow->acknowledged != before) by(0);
    return true;
}

/* Passes on that nothing more comes. */
static void end(struct flow *flow) {
    if (!flow->ended || flow->told || flow->passed < flow->taken) return;
    int64_t time = now();
    if (flow->end > time) {
        by(flow->end);
        return;
    }
    flow->told = true;
    if (flow->aborted) flow->connection->abort = time;
    else shutdown(flow->to, SHUT_WR);
}

enum verdict { STAYS, IS_OVER, IS_CUT };

static enum verdict step(struct connection *connection) {
    int64_t time = now();
    if (connection->state == ON_ITS_WAY) {
        by(connection->arrival);
        if (connection->arrival > time) return STAYS;
        if (!dial(connection)) return IS_CUT;
    }
    if (connection->state == CONNECTING) {
        if (!has_reached(connection)) return IS_CUT;
        if (connection->state != OPEN) return STAYS;
        connection->flows[FORWARD].writable = connection->flows[BACK].readable = true;
        by(0);
    }
    for (enum way way = FORWARD; way <= BACK; way++) {
        struct flow *flow = &connection->flows[way];
        /* Its sender hears of it after the way back. */
        if (!give(flow, connection->pair) && connection->abort == NEVER) connection->abort = now() + delay;
        end(flow);
    }
    if (connection->abort <= now()) return IS_CUT;
    by(connection->abort);
    return connection->flows[FORWARD].told && connection->flows[BACK].told ? IS_OVER : STAYS;
}

static void step_all(void) {
    for (struct connection **place = &connections; *place;) {
        enum verdict verdict = step(*place);
        if (verdict == STAYS) place = &(*place)->next;
        else drop(place, verdict == IS_CUT);
    }
}

/* What happens from time to time */

static uint64_t carried(enum way way) {
    uint64_t sum = 0;
    for (size_t i = 0; i < pair_count; i++) sum += pairs[i].carried[way];
    return sum;
}

/* The next one after the one that was reset last. */
static void reset_one(void) {
    struct connection **chosen = NULL, **first = NULL;
    for (struct connection **place = &connections; *place; place = &(*place)->next) {
        if ((*place)->state != OPEN) continue;
        if (!first) first = place;
        if (!chosen && (*place)->number > last_reset) chosen = place;
    }
    if (!chosen) chosen = first;
    if (!chosen) return;
    last_reset = (*chosen)->number;
    resets++;
    drop(chosen, true);
}

/* Whether somebody listens there, without a connection that would be noticed. */
static bool is_listened_to(struct sockaddr_in *target) {
    FILE *table = fopen("/proc/net/tcp", "r");
    char line[256];
    bool found = false;
    if (!table) fail("/proc/net/tcp");
    if (!fgets(line, sizeof line, table)) fail("/proc/net/tcp");
    while (!found && fgets(line, sizeof line, table)) {
        unsigned address, port, state;
        if (sscanf(line, " %*u: %x:%x %*x:%*x %x", &address, &port, &state) != 3) continue;
        /* Those that listen come first. */
        if (state != TCP_LISTEN) break;
        found = port == ntohs(target->sin_port) && (!address || address == target->sin_addr.s_addr);
    }
    fclose(table);
    return found;
}

static void look(struct pair *pair) {
    bool wanted = is_listened_to(&pair->far);
    if (!wanted && pair->ear >= 0) {
        close(pair->ear);
        pair->ear = -1;
    }
    if (!wanted || pair->ear >= 0) return;
    int one = 1, size = WAITING;
    int ear = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (ear < 0) fail("socket");
    setsockopt(ear, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    /* What a connection may announce at its beginning is the listener's. */
    if (window || rate > 0) setsockopt(ear, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (bind(ear, (void *)&pair->near, sizeof pair->near) || listen(ear, 128)) fail("listen");
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)(pair - pairs)};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, ear, &event)) fail("epoll_ctl");
    pair->ear = ear;
}

static void write_counts(FILE *file, int64_t time) {
    fprintf(file, "%.4f", (double)time / 1e9);
    for (size_t i = 0; i < pair_count; i++)
        fprintf(file, " %llu %llu", (unsigned long long)pairs[i].carried[FORWARD], (unsigned long long)pairs[i].carried[BACK]);
    fprintf(file, " %llu %llu\n", (unsigned long long)resets, (unsigned long long)starvations);
    fflush(file);
}

/* The command line */

static void parse_address(char *text, struct sockaddr_in *address) {
    char *colon = strrchr(text, ':');
    *address = (struct sockaddr_in){.sin_family = AF_INET};
    if (colon) *colon = 0;
    if (!colon || inet_pton(AF_INET, text, &address->sin_addr) != 1 || !(address->sin_port = htons((uint16_t)atoi(colon + 1)))) {
        fprintf(stderr, "line: not ADDRESS:PORT: %s\n", text);
        exit(2);
    }
}

static double parse_number(const char *name, const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (*end || end == text || value < 0) {
        fprintf(stderr, "line: --%s needs a number that is not negative, not %s\n", name, text);
        exit(2);
    }
    return value;
}

static FILE *parse(int count, char **words) {
    static const struct option options[] = {
        {"rtt", required_argument, 0, 0}, {"window", required_argument, 0, 0}, {"rate", required_argument, 0, 0},
        {"reset-every", required_argument, 0, 0}, {"reset-from", required_argument, 0, 0}, {"memory", required_argument, 0, 0},
        {"count", required_argument, 0, 0}, {0}};
    FILE *counts = NULL;
    int found, index;
    while ((found = getopt_long(count, words, "", options, &index)) == 0) {
        double value = index == 6 ? 0 : parse_number(options[index].name, optarg);
        switch (index) {
        case 0: delay = (int64_t)(value * (double)MS / 2); break;
        case 1: window = (uint64_t)value << 10; break;
        case 2: rate = value * 1e6 / 8 / 1e9; break;
        case 3: every = (int64_t)(value * 1000 * (double)MS); break;
        case 4: reset_from = (uint64_t)value << 20; break;
        case 5: most = (uint64_t)value << 20; break;
        default:
            counts = fopen(optarg, "a");
            if (!counts) fail(optarg);
        }
    }
    if (found != -1 || optind == count) {
        fprintf(stderr, "usage: line [--rtt MS] [--window KIB] [--rate MBIT] [--reset-every SECONDS [--reset-from MIB]] [--memory MIB] "
                        "[--count FILE] LISTEN:PORT=TARGET:PORT...\n");
        exit(2);
    }
    pair_count = (size_t)(count - optind);
    pairs = must(calloc(pair_count, sizeof *pairs));
    for (size_t i = 0; i < pair_count; i++) {
        char *word = words[(size_t)optind + i], *sign = strchr(word, '=');
        if (!sign) {
            fprintf(stderr, "line: not LISTEN:PORT=TARGET:PORT: %s\n", word);
            exit(2);
        }
        *sign = 0;
        parse_address(word, &pairs[i].near);
        parse_address(sign + 1, &pairs[i].far);
        pairs[i].ear = -1;
    }
    return counts;
}

static void take_event(struct epoll_event *event) {
    if (event->data.u64 < pair_count) {
        accept_all(&pairs[event->data.u64], now());
        return;
    }
    struct flow *flow = (struct flow *)(uintptr_t)event->data.u64;
    if (event->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) flow->readable = true;
    if (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) flow->connection->flows[flow->way == FORWARD ? BACK : FORWARD].writable = true;
}

int main(int count, char **words) {
    FILE *counts = parse(count, words);
    /* The kernel may otherwise wake a thread 50 us late. */
    prctl(PR_SET_TIMERSLACK, 1);
    /* A real line does not wait for a processor. Only root may ask for that; others need an idle machine. */
    struct sched_param urgent = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_RR, &urgent) && errno != EPERM) fail("sched_setscheduler");
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0) fail("epoll_create1");
    int64_t look_at = 0, count_at = counts ? 0 : NEVER, reset_at = !every ? NEVER : reset_from ? 0 : now() + every;
    bool has_begun = !reset_from;
    for (bool first = true;; first = false) {
        int64_t time = now();
        if (time >= look_at) {
            bool all = true;
            for (size_t i = 0; i < pair_count; i++) {
                look(&pairs[i]);
                all = all && pairs[i].ear >= 0;
            }
            look_at = time + (all ? 100 : 10) * MS;
        }
        if (time >= count_at) {
            write_counts(counts, time);
            count_at = time + 50 * MS;
        }
        if (time >= reset_at) {
            /* Before enough has come the clock does not run. */
            bool runs = carried(FORWARD) >= reset_from;
            if (runs && has_begun) reset_one();
            reset_at = time + (runs ? every : 10 * MS);
            has_begun = runs;
        }
        if (first && puts("ready") != EOF) fflush(stdout);
        idle_until = NEVER;
        somebody_waits = false;
        by(look_at);
        by(count_at);
        by(reset_at);
        take_all(FORWARD);
        take_all(BACK);
        step_all();
        int64_t rest = idle_until - now();
        if (rest < 0) rest = 0;
        struct timespec limit = {rest / (1000 * MS), rest % (1000 * MS)};
        struct epoll_event events[64];
        int found = epoll_pwait2(poller, events, 64, &limit, NULL);
        if (found < 0 && errno != EINTR) fail("epoll_pwait2");
        for (int i = 0; i < found; i++) take_event(&events[i]);
    }
}

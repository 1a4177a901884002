// SPDX-License-Identifier: Apache-2.0
/*
 * Services at the socket: a destination that is a service becomes one of its endpoints, once per
 * flow, and the application keeps seeing the service.
 *
 * Invariant: what is not a service passes untouched after one look-up, and receiving on a socket
 * that never used a service costs none, or one where it is connected. Nothing here decides which
 * endpoints are good: it picks one of the list, by chance, by turn or by the client's hash as the
 * list asks, or what the client had before where the service keeps clients.
 *
 * Hash map entries are recycled at once, also under a reader. So a list is read, then an endpoint, and
 * all of it was true if no list was replaced meanwhile, or if it is still the same (see is_true()).
 */
#include <stdbool.h>

#include <linux/bpf.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "common.h"

#define ECONNREFUSED 111
#define LIST_AFFINITY (1ULL << LIST_AFFINITY_BIT)
#define LIST_HASH (1ULL << LIST_HASH_BIT)
#define LIST_TURNS (1ULL << LIST_TURNS_BIT)
#define LIST_RANGES (1ULL << LIST_RANGES_BIT)
#define NO_SLOT (~0ULL) /* Of a list that never is. */
#define PASS 1
#define REFUSE 0

/* Frontend to list: its number and its length in one word. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct socket_address);
    __type(value, __u64);
    __uint(max_entries, FRONTENDS_MAX);
} hf_frontends SEC(".maps");

/* How many lists were replaced or removed: counted after the frontend has its new one, and before
 * anything of the old one goes. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, 1);
} hf_replaced SEC(".maps");

/* Slot (list number and index) to endpoint. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u64);
    __type(value, struct socket_address);
    __uint(max_entries, ENDPOINTS_MAX);
} hf_endpoints SEC(".maps");

/* Unconnected UDP socket and service, to where its datagrams go. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct socket_flow);
    __type(value, struct choice);
    __uint(max_entries, FLOWS_MAX);
} hf_flows SEC(".maps");

/* Unconnected UDP socket and endpoint, to the service it answers for. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct socket_flow);
    __type(value, struct socket_address);
    __uint(max_entries, FLOWS_MAX);
} hf_replies SEC(".maps");

/* Connected UDP socket, to what it was connected to: the agent ends it when the endpoint is gone. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, __u64);
    __type(value, struct peer);
    __uint(max_entries, CONNECTED_MAX);
} hf_connected SEC(".maps");

/* Client and service, to the endpoint that it keeps (sessionAffinity: ClientIP). */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct client);
    __type(value, struct affinity);
    __uint(max_entries, AFFINITIES_MAX);
} hf_affinities SEC(".maps");

/* Frontend to how long a client keeps its endpoint after its last new flow, in nanoseconds. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct socket_address);
    __type(value, __u64);
    __uint(max_entries, FRONTENDS_MAX);
} hf_timeouts SEC(".maps");

/* Endpoint, to how connects to it end; nothing: they are answered. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct socket_address);
    __type(value, struct failing);
    __uint(max_entries, FAILING_MAX);
} hf_failing SEC(".maps");

/* List, modulo, to whose turn it is. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, __u32);
    __uint(max_entries, TURNS_MAX);
} hf_turns SEC(".maps");

/* Connected sockets by their cookies, modulo: cookies count up, so that sockets that do not last
 * seldom meet. A place is taken until its socket closes (hf_sock_release()); who finds it taken has its
 * peer in hf_peers, whose two allocations cost a connect a microsecond. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct peer_place);
    __uint(max_entries, PEER_PLACES_MAX);
} hf_peer_places SEC(".maps");

/* With each UDP socket that ever sent to a service without being connected, and each connected socket that
 * has no place in hf_peer_places; goes with the socket. */
struct {
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, struct peer);
} hf_peers SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, COUNTERS_MAX);
} hf_counters SEC(".maps");

static __always_inline void count(__u32 counter)
{
    add_one(&hf_counters, counter);
}

static __always_inline bool same_address(const struct socket_address *a,
                                         const struct socket_address *b)
{
    return a->port == b->port && same_ip(a, b) && a->protocol == b->protocol;
}

static __always_inline bool same_list(__u64 a, __u64 b)
{
    return (a & ~(__u64)LIST_LENGTH_MASK) == (b & ~(__u64)LIST_LENGTH_MASK);
}

static __always_inline __u64 read_replaced(void)
{
    __u32 zero = 0;
    volatile __u64 *value = bpf_map_lookup_elem(&hf_replaced, &zero);

    return value ? *value : 0;
}

/* Not static: so the verifier does not follow its two ways at each of its callers' attempts. */
__noinline __u64 replaced(void)
{
    return read_replaced();
}

/* Whether `list`, and what was read by it since `replaced()` was `before`, are the service's. Not static:
 * so the verifier looks at it once. */
__noinline __u32 is_true(const struct socket_address *service, __u64 list, __u64 before)
{
    volatile __u64 *value;

    if (read_replaced() == before)
        return true;
    if (!service)
        return false;
    value = bpf_map_lookup_elem(&hf_frontends, service);
    return value && *value == list;
}

/* ---- The address in the context ---- */

static __always_inline void read_address(struct bpf_sock_addr *ctx, bool v6,
                                         struct socket_address *address)
{
    address->ip[0] = v6 ? ctx->user_ip6[0] : 0;
    address->ip[1] = v6 ? ctx->user_ip6[1] : 0;
    address->ip[2] = v6 ? ctx->user_ip6[2] : bpf_htonl(0xffff);
    address->ip[3] = v6 ? ctx->user_ip6[3] : ctx->user_ip4;
    address->port = ctx->user_port;
    address->protocol = ctx->protocol;
    address->outside = 0;
}

static __always_inline void write_address(struct bpf_sock_addr *ctx, bool v6,
                                          const struct socket_address *address)
{
    if (v6) {
        ctx->user_ip6[0] = address->ip[0];
        ctx->user_ip6[1] = address->ip[1];
        ctx->user_ip6[2] = address->ip[2];
        ctx->user_ip6[3] = address->ip[3];
    } else {
        ctx->user_ip4 = address->ip[3];
    }
    ctx->user_port = address->port;
}

/* ---- Choosing ---- */

enum verdict { NOT_A_SERVICE, NO_ENDPOINT, CHOSEN };

struct search {
    struct socket_address wanted; /* Port 0: any port. */
    __u32 zero;
    __u64 slot; /* The first slot, then the one that was found. */
    __u64 found;
};

static long compare_slot(__u32 index, void *context)
{
    struct search *search = context;
    __u64 slot = search->slot | (index & LIST_LENGTH_MASK);
    struct socket_address *endpoint = bpf_map_lookup_elem(&hf_endpoints, &slot);

    if (!endpoint || !same_ip(endpoint, &search->wanted))
        return 0;
    if (search->wanted.port && !same_address(endpoint, &search->wanted))
        return 0;
    search->slot = slot;
    search->found = 1;
    return 1;
}

/* The slot of `list` that has `kept`'s endpoint. */
static __always_inline bool find_slot(__u64 list, const struct choice *kept, __u64 *slot)
{
    struct search search = {};

    if (same_list(kept->slot, list)) {
        *slot = kept->slot;
        return true;
    }
    search.wanted = kept->endpoint;
    search.slot = list & ~(__u64)LIST_LENGTH_MASK;
    bpf_loop(list & LIST_LENGTH_MASK, compare_slot, &search, 0);
    *slot = search.slot;
    return search.found;
}

/* splitmix64's finalizer: every bit of the client decides. */
static __always_inline __u32 hash_client(__u64 client)
{
    client = (client ^ (client >> 30)) * 0xbf58476d1ce4e5b9ULL;
    client = (client ^ (client >> 27)) * 0x94d049bb133111ebULL;
    return (client ^ (client >> 31)) >> 32;
}

/* The place in `list` for a new flow, `attempt` places behind that of the first attempt.
 * Multiplying instead of dividing: the bias for 4,096 endpoints is below one in a million. No
 * function of its own: to call one that is in no cache took up to a hundredth of a connect. */
static __always_inline __u64 pick_slot(__u64 list, __u32 random, __u32 hash, __u32 attempt)
{
    __u32 length = list & LIST_LENGTH_MASK;
    __u32 turns = (list >> 16) % TURNS_MAX;
    __u32 *turn = NULL;
    __u32 index;

    if (list & LIST_TURNS)
        turn = bpf_map_lookup_elem(&hf_turns, &turns);
    if (turn) /* Each attempt is a turn. */
        index = __sync_fetch_and_add(turn, 1);
    else
        index = ((__u64)(list & LIST_HASH ? hash : random) * length >> 32) + attempt;
    return (list & ~(__u64)LIST_LENGTH_MASK) | index % length;
}

/* The slot of what a client kept, as far as it kept it and the list still has it. */
static __always_inline bool find_kept(const struct affinity *affinity, __u64 timeout_ns, __u64 list,
                                      __u64 *slot)
{
    struct choice kept;

    if (!affinity)
        return false;
    /* Signed: another CPU may have used it since. */
    if ((__s64)(bpf_ktime_get_boot_ns() - affinity->used_ns) >= (__s64)timeout_ns)
        return false;
    kept = affinity->choice;
    return find_slot(list, &kept, slot);
}

static __always_inline bool recall(const struct client *client, __u64 timeout_ns, __u64 list,
                                   __u64 *slot)
{
    return find_kept(bpf_map_lookup_elem(&hf_affinities, client), timeout_ns, list, slot);
}

/* The slot of the endpoint that the client has at this port of the service, or else at another. */
static __always_inline bool recall_any(struct bpf_sock_addr *ctx,
                                       const struct socket_address *service, __u64 list,
                                       __u64 *slot)
{
    struct client client = {.netns_cookie = bpf_get_netns_cookie(ctx), .service = *service};
    __u64 *timeout_ns = bpf_map_lookup_elem(&hf_timeouts, service);

    if (!timeout_ns)
        return false;
    if (recall(&client, *timeout_ns, list, slot))
        return true;
    client.service.port = 0;
    client.service.protocol = 0;
    return recall(&client, *timeout_ns, list, slot);
}

/* Two first flows of one client at the same time may part: the last one's endpoint is kept. */
static __always_inline void keep_client(struct bpf_sock_addr *ctx,
                                        const struct socket_address *service,
                                        const struct choice *choice)
{
    struct client client = {.netns_cookie = bpf_get_netns_cookie(ctx), .service = *service};
    struct affinity affinity = {.choice = *choice, .used_ns = bpf_ktime_get_boot_ns()};
    long failed = bpf_map_update_elem(&hf_affinities, &client, &affinity, BPF_ANY);

    client.service.port = 0;
    client.service.protocol = 0;
    affinity.choice.slot = NO_SLOT; /* Lists are of one port each. */
    affinity.choice.endpoint.port = 0;
    if (bpf_map_update_elem(&hf_affinities, &client, &affinity, BPF_ANY) || failed)
        count(COUNT_not_remembered);
}

/* By which a socket's new flow is led: another one for each socket, and for one that tries again after
 * some milliseconds: a tick of the kernel, which to read takes no call. */
static __always_inline __u32 chance(__u64 cookie)
{
    return hash_client(cookie ^ bpf_jiffies64());
}

/* `kept`: where the flow is. It stays if the list still has that. `cookie` is told unless it is not a
 * service. */
static __always_inline enum verdict choose(struct bpf_sock_addr *ctx,
                                           const struct socket_address *service, __u64 *cookie,
                                           const struct choice *kept, struct choice *choice)
{
    for (int attempt = 0; attempt < (int)READ_ATTEMPTS; attempt++) {
        __u64 list, before = replaced();
        volatile __u64 *value = bpf_map_lookup_elem(&hf_frontends, service);
        struct socket_address *endpoint;
        bool keeps_clients = false;

        if (!value)
            return NOT_A_SERVICE;
        list = *value;
        *cookie = bpf_get_socket_cookie(ctx);
        if (!(list & LIST_LENGTH_MASK))
            return NO_ENDPOINT;
        if (!kept || !find_slot(list, kept, &choice->slot)) {
            if (kept)
                count(COUNT_flow_moved);
            keeps_clients = list & LIST_AFFINITY;
            if (keeps_clients && recall_any(ctx, service, list, &choice->slot))
                count(COUNT_affinity_kept);
            else
                choice->slot = pick_slot(
                    list, chance(*cookie),
                    list & LIST_HASH ? hash_client(bpf_get_netns_cookie(ctx)) : 0, 0);
        }
        endpoint = bpf_map_lookup_elem(&hf_endpoints, &choice->slot);
        if (endpoint) {
            choice->endpoint = *endpoint;
            if (is_true(service, list, before)) {
                if (keeps_clients)
                    keep_client(ctx, service, choice);
                return CHOSEN;
            }
        }
        count(COUNT_read_again);
    }
    return NO_ENDPOINT;
}

static __always_inline int refuse(__u32 counter)
{
    count(counter);
    bpf_set_retval(-ECONNREFUSED);
    return REFUSE;
}

/* ---- connect ---- */

static __always_inline bool remember_at_socket(struct bpf_sock_addr *ctx, const struct peer *peer)
{
    struct peer *kept = bpf_sk_storage_get(&hf_peers, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

    if (kept)
        *kept = *peer;
    return kept != NULL;
}

static __always_inline struct peer_place *place_of(__u64 cookie)
{
    __u32 index = cookie % PEER_PLACES_MAX;

    return bpf_map_lookup_elem(&hf_peer_places, &index);
}

static __always_inline bool remember_at_place(__u64 cookie, const struct peer *peer)
{
    struct peer_place *place = place_of(cookie);

    if (!place || (place->cookie != cookie && __sync_val_compare_and_swap(&place->cookie, 0, cookie)))
        return false;
    place->peer = *peer;
    return true;
}

static __always_inline struct peer *recall_at_place(__u64 cookie)
{
    struct peer_place *place = place_of(cookie);

    return place && place->cookie == cookie ? &place->peer : NULL;
}

static __always_inline void remember_peer(struct bpf_sock_addr *ctx, __u64 cookie,
                                          const struct socket_address *service,
                                          const struct choice *choice)
{
    struct peer peer = {.service = *service, .endpoint = choice->endpoint};
    bool remembered = remember_at_place(cookie, &peer) || remember_at_socket(ctx, &peer);

    if (ctx->protocol == PROTOCOL_UDP) /* Without an entry it stays with an endpoint that is gone. */
        remembered &= !bpf_map_update_elem(&hf_connected, &cookie, &peer, BPF_ANY);
    if (!remembered)
        count(COUNT_not_remembered);
}

static __always_inline struct peer *recall_at_socket(struct bpf_sock_addr *ctx)
{
    return bpf_sk_storage_get(&hf_peers, ctx->sk, 0, 0);
}

/* What was remembered of a socket when it was connected. */
static __always_inline struct peer *find_peer(struct bpf_sock_addr *ctx)
{
    return recall_at_place(bpf_get_socket_cookie(ctx)) ?: recall_at_socket(ctx);
}

/* Of a UDP socket that is connected elsewhere. */
static __always_inline void forget_connected(struct bpf_sock_addr *ctx)
{
    __u64 cookie = bpf_get_socket_cookie(ctx);
    struct peer *peer = find_peer(ctx);

    if (!peer)
        return;
    peer->endpoint.port = 0;
    bpf_map_delete_elem(&hf_connected, &cookie);
}

static __always_inline int on_connect(struct bpf_sock_addr *ctx, bool v6)
{
    struct socket_address service;
    struct choice choice = {};
    __u64 cookie;

    if (ctx->protocol != PROTOCOL_TCP && ctx->protocol != PROTOCOL_UDP)
        return PASS;
    read_address(ctx, v6, &service);

    switch (choose(ctx, &service, &cookie, NULL, &choice)) {
    case NOT_A_SERVICE:
        count(COUNT_connect_passed);
        if (ctx->protocol == PROTOCOL_UDP) /* It may have been connected to a service before. */
            forget_connected(ctx);
        return PASS;
    case NO_ENDPOINT:
        return refuse(COUNT_connect_refused);
    case CHOSEN:
        break;
    }

    remember_peer(ctx, cookie, &service, &choice);
    write_address(ctx, v6, &choice.endpoint);
    count(COUNT_connect_rewritten);
    return PASS;
}

/* ---- sendmsg: datagrams with a destination of their own ---- */

static __always_inline bool remember(struct bpf_sock_addr *ctx, const struct socket_flow *flow,
                                     bool is_new, const struct choice *choice)
{
    struct socket_flow reply = {.cookie = flow->cookie, .address = choice->endpoint};
    struct socket_address *service;

    if (is_new && bpf_map_update_elem(&hf_flows, flow, choice, BPF_ANY))
        return false;
    service = bpf_map_lookup_elem(&hf_replies, &reply);
    if (!service || !same_address(service, &flow->address)) {
        if (bpf_map_update_elem(&hf_replies, &reply, &flow->address, BPF_ANY))
            return false;
    }
    /* Its existence tells on_receive() to look. */
    return bpf_sk_storage_get(&hf_peers, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE) != NULL;
}

static __always_inline int on_send(struct bpf_sock_addr *ctx, bool v6)
{
    struct socket_flow flow = {};
    struct choice choice = {};
    struct choice *kept = NULL;
    __u64 kept_slot = 0;

    if (ctx->protocol != PROTOCOL_UDP)
        return PASS;
    read_address(ctx, v6, &flow.address);

    if (!bpf_map_lookup_elem(&hf_frontends, &flow.address)) {
        count(COUNT_send_passed);
        return PASS;
    }
    flow.cookie = bpf_get_socket_cookie(ctx);
    kept = bpf_map_lookup_elem(&hf_flows, &flow);
    if (kept)
        kept_slot = kept->slot;

    switch (choose(ctx, &flow.address, &flow.cookie, kept, &choice)) {
    case NOT_A_SERVICE:
        count(COUNT_send_passed);
        return PASS;
    case NO_ENDPOINT:
        return refuse(COUNT_send_refused);
    case CHOSEN:
        break;
    }

    if (!remember(ctx, &flow, !kept || kept_slot != choice.slot, &choice))
        count(COUNT_not_remembered);
    write_address(ctx, v6, &choice.endpoint);
    count(COUNT_send_rewritten);
    return PASS;
}

/* ---- What the application sees ---- */

static __always_inline int on_receive(struct bpf_sock_addr *ctx, bool v6)
{
    bool connected = ctx->sk->state == BPF_TCP_ESTABLISHED; /* By UDP, too. */
    struct peer *peer = connected ? find_peer(ctx) : recall_at_socket(ctx);
    struct socket_address *service;
    struct socket_flow reply = {};

    if (!peer)
        return PASS;
    read_address(ctx, v6, &reply.address);
    if (same_address(&peer->endpoint, &reply.address)) {
        write_address(ctx, v6, &peer->service);
    } else {
        reply.cookie = bpf_get_socket_cookie(ctx);
        service = bpf_map_lookup_elem(&hf_replies, &reply);
        if (!service)
            return PASS;
        write_address(ctx, v6, service);
    }
    count(COUNT_receive_rewritten);
    return PASS;
}

static __always_inline int on_peer_name(struct bpf_sock_addr *ctx, bool v6)
{
    struct peer *peer = find_peer(ctx);
    struct socket_address address;

    if (!peer)
        return PASS;
    read_address(ctx, v6, &address);
    if (same_address(&peer->endpoint, &address)) {
        write_address(ctx, v6, &peer->service);
        count(COUNT_peer_name_rewritten);
    }
    return PASS;
}

/* ---- How connects end ---- */

static __always_inline void endpoint_connected(const struct socket_address *endpoint)
{
    struct failing *failing = bpf_map_lookup_elem(&hf_failing, endpoint);

    if (failing && failing->in_a_row)
        failing->in_a_row = 0;
}

static __always_inline void endpoint_failed(const struct socket_address *endpoint)
{
    struct failing first = {.failed = 1, .in_a_row = 1};
    struct failing *failing = bpf_map_lookup_elem(&hf_failing, endpoint);

    if (failing) {
        __sync_fetch_and_add(&failing->failed, 1);
        __sync_fetch_and_add(&failing->in_a_row, 1);
    } else {
        bpf_map_update_elem(&hf_failing, endpoint, &first, BPF_ANY);
    }
}

/* What a socket was led to; NULL: it was not. */
static __always_inline struct peer *led(struct bpf_sock_ops *ctx)
{
    struct peer *peer = recall_at_place(bpf_get_socket_cookie(ctx));
    struct bpf_sock *socket = ctx->sk;

    return peer ?: socket ? bpf_sk_storage_get(&hf_peers, socket, 0, 0) : NULL;
}

static __always_inline void on_connected(struct bpf_sock_ops *ctx)
{
    struct peer *peer = led(ctx);

    if (peer)
        endpoint_connected(&peer->endpoint);
}

static __always_inline void on_failed(struct bpf_sock_ops *ctx)
{
    struct peer *peer = led(ctx);

    if (!peer)
        return;
    count(COUNT_connect_failed);
    endpoint_failed(&peer->endpoint);
}

/* Of a socket that was led, timeouts and changes of state are told: two or three of a connection,
 * none for its packets. Others may have asked for the same, so that it is not taken back.
 *
 * A connect failed when its SYN has to be sent again, after a second, however it ends; or when it
 * ends before, not by its client: then the kernel has emptied the queue, the SYN in it (after a
 * reset, and since Linux 6.10 after an ICMP error). */
SEC("sockops")
int hf_sock_ops(struct bpf_sock_ops *ctx)
{
    const __u32 told = BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;

    switch (ctx->op) {
    case BPF_SOCK_OPS_TCP_CONNECT_CB:
        if (led(ctx))
            bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | told);
        break;
    case BPF_SOCK_OPS_RTO_CB: /* How often it was sent again before. */
        if (ctx->state == BPF_TCP_SYN_SENT && !ctx->args[0])
            on_failed(ctx);
        break;
    case BPF_SOCK_OPS_STATE_CB: /* From, to. */
        if (ctx->args[0] != BPF_TCP_SYN_SENT)
            break;
        if (ctx->args[1] == BPF_TCP_ESTABLISHED)
            on_connected(ctx);
        else if (ctx->args[1] == BPF_TCP_CLOSE && !ctx->packets_out && !ctx->total_retrans)
            on_failed(ctx);
        break;
    }
    return 1;
}

/* ---- The hooks ---- */

/* The last descriptor of a socket is closed, or its process ended. */
SEC("cgroup/sock_release")
int hf_sock_release(struct bpf_sock *ctx)
{
    struct peer_place *place;
    __u64 cookie;

    if (ctx->protocol != PROTOCOL_TCP && ctx->protocol != PROTOCOL_UDP)
        return 1;
    cookie = bpf_get_socket_cookie(ctx);
    place = place_of(cookie);
    if (place && place->cookie == cookie)
        place->cookie = 0;
    return 1;
}

#define HOOK(section, name, function, v6)   \
    SEC(section)                            \
    int name(struct bpf_sock_addr *ctx)     \
    {                                       \
        return function(ctx, v6);           \
    }

HOOK("cgroup/connect4", hf_connect4, on_connect, false)
HOOK("cgroup/connect6", hf_connect6, on_connect, true)
HOOK("cgroup/sendmsg4", hf_sendmsg4, on_send, false)
HOOK("cgroup/sendmsg6", hf_sendmsg6, on_send, true)
HOOK("cgroup/recvmsg4", hf_recvmsg4, on_receive, false)
HOOK("cgroup/recvmsg6", hf_recvmsg6, on_receive, true)
HOOK("cgroup/getpeername4", hf_getpeername4, on_peer_name, false)
HOOK("cgroup/getpeername6", hf_getpeername6, on_peer_name, true)

/* Every helper used here is open to programs of any licence. */
char _license[] SEC("license") = "Apache-2.0";

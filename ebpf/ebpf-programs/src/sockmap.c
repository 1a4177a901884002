// SPDX-License-Identifier: Apache-2.0
/*
 * From socket to socket: what is written at one end of a connection goes into the other end's queue, past TCP, where
 * both are on this node and the service asks for it. Included after services.c.
 *
 * The client's end joins as it is connected, and the server's a moment later, if it is the same connection:
 * they find each other by its ends and by both sequence numbers, so that whoever has the same addresses in another
 * namespace, or wants to, is not taken for it.
 *
 * Invariant: an end that once wrote by TCP does so for good. Who reads takes first what came past TCP, so that all of it is in order.
 * An end goes back to TCP when the other does not answer, when it is gone, when it said that it will write no more, and when policy
 * changed, which judges packets. Nothing is taken out of the map before its socket closes: unread bytes would be lost.
 */

#define AF_INET 2

enum { CLIENT, SERVER };
enum { ALONE, JOINED, BY_TCP };

/* Services that ask for it, with their endpoints on this node. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct peer);
    __type(value, __u32);
    __uint(max_entries, SOCKMAP_PAIRS_MAX);
} hf_sockmap_for SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_SOCKHASH);
    __type(key, struct connection_end);
    __type(value, __u32);
    __uint(max_entries, SOCKMAP_ENDS_MAX);
} hf_sockmap SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __type(key, struct connection);
    __type(value, struct exchange);
    __uint(max_entries, SOCKMAP_CONNECTIONS_MAX);
} hf_exchanges SEC(".maps");

/* When all that were joined had to go back to TCP. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, 1);
} hf_sockmap_left SEC(".maps");

struct joined {
    struct connection_end other;
    __u32 by_tcp;
};

/* With each socket that joined. */
struct {
    __uint(type, BPF_MAP_TYPE_SK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, struct joined);
} hf_joined SEC(".maps");

static __always_inline __u64 all_left_ns(void)
{
    __u32 zero = 0;
    volatile __u64 *left_ns = bpf_map_lookup_elem(&hf_sockmap_left, &zero);

    return left_ns ? *left_ns : 0;
}

/* At once, whatever the family is: else clang reads by a pointer into the context, which the verifier refuses. */
#define READ(field)                         \
    ({                                      \
        __u32 value = field;                \
        asm volatile("" : "+r"(value));     \
        value;                              \
    })

#define READ_IP(ctx, which, to)                                                      \
    do {                                                                             \
        const __u32 v4 = READ(ctx->which##_ip4);                                     \
        const __u32 v6[4] = {READ(ctx->which##_ip6[0]), READ(ctx->which##_ip6[1]),   \
                             READ(ctx->which##_ip6[2]), READ(ctx->which##_ip6[3])};  \
        const bool is_v4 = ctx->family == AF_INET;                                   \
                                                                                     \
        to->ip[0] = is_v4 ? 0 : v6[0];                                               \
        to->ip[1] = is_v4 ? 0 : v6[1];                                               \
        to->ip[2] = is_v4 ? bpf_htonl(0xffff) : v6[2];                               \
        to->ip[3] = is_v4 ? v4 : v6[3];                                              \
    } while (0)

static __always_inline void read_ends(struct bpf_sock_ops *ctx, struct socket_address *local,
                                      struct socket_address *remote)
{
    READ_IP(ctx, local, local);
    READ_IP(ctx, remote, remote);
    local->port = bpf_htons(ctx->local_port);
    remote->port = bpf_htons(bpf_ntohl(ctx->remote_port));
    local->protocol = remote->protocol = PROTOCOL_TCP;
}

/* Whether this end is in the map now. */
static __always_inline bool join(struct bpf_sock_ops *ctx, const struct connection *connection, __u32 end)
{
    struct connection_end own = {.connection = *connection, .end = end};
    struct bpf_sock *socket = ctx->sk;
    struct joined *joined;

    if (!socket)
        return false;
    joined = bpf_sk_storage_get(&hf_joined, socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!joined)
        return false;
    joined->other = own;
    joined->other.end = !end;
    bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
    return !bpf_sock_hash_update(ctx, &hf_sockmap, &own, BPF_NOEXIST);
}

static __always_inline void on_client(struct bpf_sock_ops *ctx)
{
    struct connection connection = {};
    struct exchange exchange = {.state = ALONE, .joined_ns = bpf_ktime_get_coarse_ns()};
    struct peer *peer = led(ctx);

    /* What TCP Fast Open sent is not in order with what goes past TCP. */
    if (!peer || !bpf_map_lookup_elem(&hf_sockmap_for, peer) || ctx->data_segs_out)
        return;
    /* What opened it may have been judged before policy changed. */
    if ((__s64)(exchange.joined_ns - all_left_ns()) < SOCKMAP_SETTLE_MS * 1000000ll)
        return;
    read_ends(ctx, &connection.client, &connection.server);
    connection.client_begins = ctx->snd_nxt;
    connection.server_begins = ctx->rcv_nxt;
    if (bpf_map_update_elem(&hf_exchanges, &connection, &exchange, BPF_NOEXIST))
        return;
    if (!join(ctx, &connection, CLIENT))
        bpf_map_delete_elem(&hf_exchanges, &connection);
}

static __always_inline void on_server(struct bpf_sock_ops *ctx)
{
    struct connection connection = {};
    struct exchange *exchange;

    read_ends(ctx, &connection.server, &connection.client);
    connection.server_begins = ctx->snd_nxt;
    connection.client_begins = ctx->rcv_nxt;
    exchange = bpf_map_lookup_elem(&hf_exchanges, &connection);
    if (!exchange || __sync_val_compare_and_swap(&exchange->state, ALONE, JOINED) != ALONE)
        return;
    if (join(ctx, &connection, SERVER))
        count(COUNT_sockmap_joined);
}

/* The state of an end changes: only where nobody said yet that no more will be written may it go past TCP. */
static __always_inline void on_state(struct bpf_sock_ops *ctx)
{
    struct bpf_sock *socket = ctx->sk;
    struct joined *joined = socket ? bpf_sk_storage_get(&hf_joined, socket, 0, 0) : NULL;

    if (!joined || ctx->args[1] == BPF_TCP_ESTABLISHED || ctx->args[1] == BPF_TCP_CLOSE_WAIT)
        return;
    joined->by_tcp = true;
    if (ctx->args[1] == BPF_TCP_CLOSE)
        bpf_map_delete_elem(&hf_exchanges, &joined->other.connection);
}

/* Of the sockets of the cgroup: each connect and accept asks it several times. */
SEC("sockops")
int hf_sockmap_join(struct bpf_sock_ops *ctx)
{
    switch (ctx->op) {
    case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
        on_client(ctx);
        break;
    case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
        on_server(ctx);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        on_state(ctx);
        break;
    }
    return 1;
}

static __always_inline bool passes_tcp(struct sk_msg_md *msg, struct joined *joined)
{
    bool is_client = joined->other.end == SERVER;
    struct exchange *exchange;
    __u32 unanswered;

    exchange = bpf_map_lookup_elem(&hf_exchanges, &joined->other.connection);
    if (!exchange || exchange->joined_ns <= all_left_ns())
        return false;
    unanswered = (is_client ? exchange->asked : exchange->answered) + msg->size;
    if (unanswered > SOCKMAP_UNANSWERED_MAX)
        return false;
    /* Before the server joined: it will not any more then. */
    if (exchange->state != JOINED &&
        __sync_val_compare_and_swap(&exchange->state, ALONE, BY_TCP) != JOINED)
        return false;
    if (bpf_msg_redirect_hash(msg, &hf_sockmap, &joined->other, BPF_F_INGRESS) != SK_PASS)
        return false;
    exchange->asked = is_client ? unanswered : 0;
    exchange->answered = is_client ? 0 : unanswered;
    return true;
}

/* What a socket that joined writes, each time. */
SEC("sk_msg")
int hf_sockmap_pass(struct sk_msg_md *msg)
{
    struct bpf_sock *socket = msg->sk;
    struct joined *joined = socket ? bpf_sk_storage_get(&hf_joined, socket, 0, 0) : NULL;

    if (joined && !joined->by_tcp && !passes_tcp(msg, joined)) {
        joined->by_tcp = true;
        count(COUNT_sockmap_left);
    }
    return SK_PASS; /* By TCP, unless it was redirected. */
}

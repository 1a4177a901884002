// SPDX-License-Identifier: Apache-2.0
/*
 * The flows of packets.c: each has one place, and is found there both ways, as both know the client.
 * The hash of its address and port says in which set; a set's tags say which of its places to look at.
 *
 * A hash map of the kernel would need an entry for each way, of which one that forgets takes 0.35 µs of a SYN each.
 *
 * Invariant: of a client, no two flows that go on are with one service, nor with one endpoint. Places are
 * taken and given back with the set's lock held; who reads one holds none, and sees by its generation
 * whether it became another flow's meanwhile. To note what passed takes no lock either: a place just found
 * is taken away only if its flow is over, or if all of its set were used since it was.
 */

#define NO_FLOW (~0ull)
#define WAY_MASK ((1ull << TRACKED_WAY_BITS) - 1)

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct tracked_set);
    __uint(max_entries, TRACKED_SETS);
} hf_tracked SEC(".maps");

/* What nobody else knows of the hash: else a device could choose whose flows are forgotten for its own. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, __u64);
    __uint(max_entries, 1);
} hf_tracked_seed SEC(".maps");

/* By the number of the place, the generation that the agent wants to be over. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, __u32);
    __uint(max_entries, TRACKED_PLACES);
} hf_ended SEC(".maps");

/* A flow is called by the number of its place, and above it the place's generation: NO_FLOW is none. */
static __always_inline __u32 way_of(__u64 found)
{
    return found & WAY_MASK;
}

static __always_inline struct tracked_set *set_with(__u64 found)
{
    __u32 set = (__u32)found >> TRACKED_WAY_BITS;

    return bpf_map_lookup_elem(&hf_tracked, &set);
}

static __always_inline __u64 client_hash(const struct socket_address *client)
{
    __u32 zero = 0;
    __u64 *seed = bpf_map_lookup_elem(&hf_tracked_seed, &zero);
    __u64 hash = seed ? *seed : 0;

    hash = (hash ^ ((__u64)client->ip[0] << 32 | client->ip[1])) * 0xbf58476d1ce4e5b9ULL;
    hash = (hash ^ (hash >> 32) ^ ((__u64)client->ip[2] << 32 | client->ip[3])) *
           0x94d049bb133111ebULL;
    hash = (hash ^ (hash >> 32) ^ ((__u64)client->port << 8 | client->protocol)) *
           0xbf58476d1ce4e5b9ULL;
    return hash ^ (hash >> 32);
}

static __always_inline __u32 set_of(__u64 hash)
{
    return (hash >> 32) & (TRACKED_SETS - 1);
}

static __always_inline __u32 tag_of(__u64 hash)
{
    return (__u32)hash | 1; /* 0 is none. */
}

/* The place of its set that a flow takes if it can, and where it is looked for first. By other bits than those that say
 * which set. */
static __always_inline __u32 first_way(__u64 hash)
{
    return ((hash >> 1 & 0xffff) * TRACKED_WAYS) >> 16;
}

static __always_inline struct tracked *flow_at(__u64 found)
{
    struct tracked_set *flows = set_with(found);
    __u32 way = way_of(found);

    return flows && way < TRACKED_WAYS ? &flows->flows[way] : NULL; /* NO_FLOW's is none. */
}

/* Whether what was read at the place is of the flow that was found there. */
static __always_inline bool is_still(const struct tracked *flow, __u64 found)
{
    return *(volatile __u32 *)&flow->generation == (__u32)(found >> 32);
}

/* A bit for each place with this tag. Without a branch: the verifier would follow each of them. */
static __always_inline __u32 ways_with(const struct tracked_set *flows, __u32 tag)
{
    __u32 ways = 0;

#pragma clang loop unroll(full)
    for (__u32 way = 0; way < TRACKED_WAYS; way++) {
        __u64 same = (__u64)(flows->tags[way] ^ tag) - 1;

        asm volatile("" : "+r"(same) : : "memory"); /* Else clang makes it a branch, or keeps all tags. */
        ways |= (same >> 63) << way;
    }
    return ways;
}

/* The number of the lowest bit of `ways`, of 15 or less; 15: there is none. By a de Bruijn sequence, as BPF has no
 * instruction for it, and as the verifier would follow each of the places that a loop finds. */
static __always_inline __u32 lowest(__u32 ways)
{
    const __u64 numbers = 0xcd7ea84fb6935210ull;
    __u32 bit;

    ways |= 1u << TRACKED_WAYS;
    bit = ways & -ways;
    return numbers >> ((bit * 0x09af >> 10) & 0x3c) & 0xf;
}

/* The flow at this place, if it is the client's with this service, or with this endpoint. */
static __always_inline __u64 found_at(const struct tracked *flow, __u32 place,
                                      const struct socket_address *client,
                                      const struct socket_address *with, __u32 endpoint)
{
    __u32 generation = *(volatile __u32 *)&flow->generation;

    if ((generation & 1) || !same_address(&flow->client, client) ||
        !same_address(endpoint ? &flow->endpoint : &flow->service, with))
        return NO_FLOW;
    return (__u64)generation << 32 | place;
}

/* Has all of a place brought to the processor, which does not wait for it. */
static __always_inline void bring(const struct tracked *flow)
{
    __u32 first = *(volatile __u32 *)&flow->client, last = *(volatile __u32 *)&flow->noted;

    asm volatile("" : : "r"(first), "r"(last));
}

/* Where the client's flow is with this service, or with this endpoint. Not static: so the verifier looks at it once. */
__noinline __u64 find_flow(const struct socket_address *client, const struct socket_address *with,
                           __u32 endpoint)
{
    struct tracked_set *flows;
    __u32 set, way, ways;
    __u64 hash, found;

    if (!client || !with)
        return NO_FLOW;
    hash = client_hash(client);
    set = set_of(hash);
    flows = bpf_map_lookup_elem(&hf_tracked, &set);
    if (!flows)
        return NO_FLOW;
    set <<= TRACKED_WAY_BITS;
    way = first_way(hash);
    bring(&flows->flows[way]); /* A new flow takes it: all that the table costs it is one wait for memory. */
    if (flows->tags[way] == tag_of(hash)) {
        found = found_at(&flows->flows[way], set | way, client, with, endpoint);
        if (found != NO_FLOW)
            return found;
    }
    ways = ways_with(flows, tag_of(hash));
    for (__u32 i = 0; i < TRACKED_WAYS && ways; i++) {
        way = lowest(ways);
        if (way >= TRACKED_WAYS)
            break;
        found = found_at(&flows->flows[way], set | way, client, with, endpoint);
        if (found != NO_FLOW)
            return found;
        ways &= ways - 1;
    }
    return NO_FLOW;
}

static __always_inline bool is_closed(const struct tracked *flow)
{
    const __u32 both = SEEN_CLIENT_FIN | SEEN_ENDPOINT_FIN;

    return (flow->seen & SEEN_RESET) || (flow->seen & both) == both;
}

static __always_inline bool is_over(const struct tracked *flow, __u64 now_ns)
{
    __s64 timeout_s = TCP_OPEN_TIMEOUT_S;

    if (flow->client.protocol == PROTOCOL_UDP) {
        if (flow->seen & SEEN_ENDED)
            return true;
        timeout_s = UDP_TIMEOUT_S;
    } else if (is_closed(flow) || !(flow->seen & SEEN_ANSWER)) {
        timeout_s = TCP_TRANSITORY_TIMEOUT_S;
    }
    /* Another CPU may have seen a packet since `now_ns`. */
    return (__s64)(now_ns - flow->seen_ns) >= timeout_s * NS_PER_S + SEEN_INTERVAL_MS * NS_PER_MS;
}

/* What tells them apart without a branch. */
#define ONLY_TCP_S_BIT 2
_Static_assert((PROTOCOL_TCP & ONLY_TCP_S_BIT) && !(PROTOCOL_UDP & ONLY_TCP_S_BIT), "tell TCP from UDP otherwise");

/* The place of the flow that was used least recently, of those last that are TCP and go on: UDP is mostly a question
 * and its answer, and nobody says when it was the last one. */
static __always_inline __u32 least_used(const struct tracked_set *flows)
{
    __u64 least = ~0ull >> 1;

#pragma clang loop unroll(full)
    for (__u32 way = 0; way < TRACKED_WAYS; way++) {
        const struct tracked *flow = &flows->flows[way];
        __u64 closed = flow->seen / SEEN_RESET |
                       (flow->seen / SEEN_CLIENT_FIN & flow->seen / SEEN_ENDPOINT_FIN);
        __u64 goes_on = flow->client.protocol / ONLY_TCP_S_BIT & flow->seen / SEEN_ANSWER & ~closed & 1;
        __u64 used = goes_on << 62 | (flow->seen_ns & (~0ull >> 2) & ~WAY_MASK) | way;
        __s64 less = (__s64)(used - least) >> 63;

        asm volatile("" : "+r"(less)); /* As above. */
        least += less & (used - least);
    }
    return way_of(least);
}

/* Nothing that is written before comes after it, nor the other way round: so atomic operations are whose result is used. */
static __always_inline void next_generation(struct tracked *flow)
{
    __u32 before = __sync_fetch_and_add(&flow->generation, 1);

    asm volatile("" : : "r"(before) : "memory");
}

static __always_inline void take_place(struct tracked *flow, const struct tracked *taken)
{
    next_generation(flow);
    flow->client = taken->client;
    flow->service = taken->service;
    flow->endpoint = taken->endpoint;
    flow->seen = taken->seen;
    flow->seen_ns = taken->seen_ns;
    flow->noted = taken->noted;
    next_generation(flow);
}

enum kept { KEPT, KNOWN, TAKEN, NOT_KEPT };

/* What becomes of a new flow beside one that is there, with this tag. */
static __always_inline enum kept beside(struct tracked *flow, __u32 *tag, struct tracked *opened,
                                        bool opens, enum kept kept)
{
    bool same_service = same_address(&flow->service, &opened->service);

    if (!same_address(&flow->client, &opened->client) ||
        (!same_service && !same_address(&flow->endpoint, &opened->endpoint)))
        return kept;
    if (is_over(flow, opened->seen_ns) || (same_service && opens && is_closed(flow))) {
        *tag = 0;
        return kept;
    }
    if (!same_service)
        return TAKEN;
    opened->endpoint = flow->endpoint;
    return KNOWN;
}

/* Remembers a new flow, unless another CPU had a packet of it: KNOWN, and that one's endpoint becomes the
 * new one's. TAKEN: its client speaks with the endpoint by another service. `opens`: in the place of one that
 * is closed. Not static: so the verifier looks at it once, not with each attempt. */
__noinline __u32 keep_flow(struct tracked *opened, __u32 opens)
{
    struct tracked_set *flows;
    __u32 set, tag, way, ways;
    enum kept kept = KEPT;
    __u64 hash;

    if (!opened)
        return NOT_KEPT;
    hash = client_hash(&opened->client);
    set = set_of(hash);
    tag = tag_of(hash);
    flows = bpf_map_lookup_elem(&hf_tracked, &set);
    if (!flows)
        return NOT_KEPT;
    bpf_spin_lock(&flows->lock);
    ways = ways_with(flows, tag);
    for (__u32 i = 0; i < TRACKED_WAYS && ways && kept != KNOWN; i++) {
        way = lowest(ways);
        if (way >= TRACKED_WAYS)
            break;
        kept = beside(&flows->flows[way], &flows->tags[way], opened, opens, kept);
        ways &= ways - 1;
    }
    if (kept == KEPT) {
        way = first_way(hash);
        if (flows->tags[way] && !is_over(&flows->flows[way], opened->seen_ns)) {
            way = lowest(ways_with(flows, 0));
            if (way >= TRACKED_WAYS)
                way = least_used(flows);
        }
        if (way < TRACKED_WAYS) {
            take_place(&flows->flows[way], opened);
            flows->tags[way] = tag;
        }
    }
    bpf_spin_unlock(&flows->lock);
    return kept;
}

/* Gives back the place of a flow that was found. */
static __always_inline void forget_flow(__u64 found)
{
    struct tracked_set *flows = set_with(found);
    __u32 way = way_of(found);

    if (!flows || way >= TRACKED_WAYS)
        return;
    bpf_spin_lock(&flows->lock);
    if (is_still(&flows->flows[way], found))
        flows->tags[way] = 0;
    bpf_spin_unlock(&flows->lock);
}

/* Whether the agent wants a flow that was found to be over: of those by UDP alone. */
static __always_inline bool is_ended(const struct tracked *flow, __u64 found)
{
    __u32 place = found, *generation;

    if (flow->client.protocol != PROTOCOL_UDP)
        return false;
    generation = bpf_map_lookup_elem(&hf_ended, &place);
    return generation && *generation == (__u32)(found >> 32); /* No flow's is 0. */
}

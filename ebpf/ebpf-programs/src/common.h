// SPDX-License-Identifier: Apache-2.0
/*
 * What all programs need.
 */
#pragma once

#include <stdbool.h>

#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#include "ebpf_abi.h"

/* `counters` is an array for each CPU: its own is changed, and a preempted increment may be lost. */
static __always_inline void add_one(void *counters, __u32 counter)
{
    __u64 *value = bpf_map_lookup_elem(counters, &counter);

    if (value)
        *value += 1;
}

static __always_inline bool same_ip(const struct socket_address *a, const struct socket_address *b)
{
    return a->ip[3] == b->ip[3] && a->ip[2] == b->ip[2] && a->ip[1] == b->ip[1] &&
           a->ip[0] == b->ip[0];
}

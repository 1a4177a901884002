//! Linux adapters: netlink, TUN, UDP batches, namespaces.

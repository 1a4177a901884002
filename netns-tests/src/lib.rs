//! The lab: nodes, NATs, links and scenarios in network namespaces.

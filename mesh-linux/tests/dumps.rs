//! Tables listed by several tasks at once. Needs no root.

use mesh_linux::netlink::Netlink;

#[tokio::test]
async fn tables_can_be_listed_by_several_tasks_at_once() {
    let netlink = Netlink::connect().unwrap();
    let tasks = (0..20).map(|_| {
        let netlink = netlink.clone();
        tokio::spawn(async move {
            let loopback = netlink.link_index("lo").await?;
            netlink.ways("none").await?;
            netlink.routes().await?;
            netlink.addresses(loopback).await
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        assert!(!task.await.unwrap().unwrap().is_empty());
    }
}

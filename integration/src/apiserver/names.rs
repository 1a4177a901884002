//! Which names are names.

/// An RFC 1123 label: at most 63 of `a-z`, `0-9` and `-`, not at an edge.
pub(crate) fn is_label(name: &str) -> bool {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&name.len())
        && name.chars().all(good)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// An RFC 1035 label: as [`is_label`], and it begins with a letter.
pub(crate) fn is_rfc1035_label(name: &str) -> bool {
    is_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase())
}

/// An RFC 1123 subdomain: labels with dots between, at most 253 characters.
pub(crate) fn is_subdomain(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            !label.is_empty()
                && label.chars().all(good)
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// What can stand in a path: RBAC's names may have colons and capitals.
pub(crate) fn is_path_segment(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '%'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_others() {
        assert!(is_label("a-1") && is_label("1a"));
        assert!(!is_label("") && !is_label("-a") && !is_label("A") && !is_label("a.b"));
        assert!(is_rfc1035_label("a1") && !is_rfc1035_label("1a"));
        assert!(is_subdomain("a.b-c.1") && !is_subdomain("a..b") && !is_subdomain("a_b"));
        assert!(is_path_segment("system:node") && !is_path_segment("a/b"));
    }
}

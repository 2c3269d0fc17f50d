//! The pages of the documentation, which are in the folder `docs` of the sources too.
//!
//! Links between pages lead to files of that folder.

macro_rules! pages {
    ($($(#[$doc:meta])* $name:ident: $file:literal,)+) => {
        $(
            $(#[$doc])*
            #[doc = ""]
            #[doc = include_str!(concat!("../docs/", $file))]
            pub mod $name {}
        )+
    };
}

pages! {
    benchmarks: "benchmarks.md",
    captured_tables: "captured-tables.md",
    consuming: "consuming.md",
    delivery: "delivery.md",
    event_sourcing: "event-sourcing.md",
    failure_modes: "failure-modes.md",
    file_format: "file-format.md",
    glossary: "glossary.md",
    migrating: "migrating.md",
    operating: "operating.md",
    rabbitmq: "rabbitmq.md",
    testing: "testing.md",
}

//! `list` and `status`: every driver domain's functions, where they are, and how they stand. Which functions there
//! are is read from the driver domains' configurations; how they stand, from what the driver domains publish. Counters
//! are published only if they are asked for, which `status` does and `list` does not: it writes nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use pciback::serve::Counters;
use serde_json::{Value, json};

use crate::attach::Host;
use crate::error::Outcome;
use crate::nodes::{self, told};

/// How long driver domains may take to tell their counters, all together.
const COUNTING: Duration = Duration::from_secs(2);

/// What a driver domain may say of dom0's service.
const SERVING: [&str; 3] = ["connected", "not connected", "not needed"];

/// The most of a cell that the table of `status` shows: a driver domain's words do not widen it for the others.
const CELL: usize = 48;

/// One function of one driver domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Driver domain: number and name.
    pub driver: (u32, String),
    /// Address.
    pub function: String,
    /// `resetting`, `ready`, `in-use`, `broken`, or `unknown` while the driver domain has not said.
    pub state: String,
    /// Vendor and device id.
    pub id: String,
    /// The guest that has it: number and name.
    pub guest: Option<(u32, String)>,
    /// The only guest that may have it.
    pub promised: Option<String>,
    /// The address in the guest.
    pub address: Option<String>,
    /// Why it is broken.
    pub reason: Option<String>,
    /// Mode of the driver domain.
    pub mode: String,
    /// Why it is in that mode.
    pub mode_why: String,
    /// How the function is reset between guests: `flr`, `af`, `pm`, `dom0` or `none`.
    pub reset: Option<String>,
    /// What it uses: `INTx`, `MSI N` or `MSI-X N`, with N vectors.
    pub interrupts: Option<String>,
    /// What the checks of its MSI-X state found.
    pub msix: Option<String>,
    /// The last error that was reported of it, and what came of it.
    pub aer: Option<String>,
    /// Whether dom0's service takes part: `connected`, `not connected` or `not needed`.
    pub serve: Option<String>,
    /// What guests have asked of it, if that was asked for and told.
    pub counters: Option<Counters>,
}

/// All rows.
///
/// # Errors
/// `xl list` does not answer.
pub fn rows(host: &Host<'_>) -> Outcome<Vec<Row>> {
    let mut rows = Vec::new();
    for driver in host.domains.drivers()? {
        let own = |node: &str| told(host.store, &nodes::own(driver.domid, node));
        let (mode, mode_why) = (own("mode").unwrap_or_default(), own("mode-why").unwrap_or_default());
        let serve = own("serve").filter(|word| SERVING.contains(&word.as_str()));
        for device in &driver.config.devices {
            let sbdf = device.sbdf;
            let read = |node: &str| {
                told(host.store, &nodes::published(driver.domid, sbdf, node)).filter(|text| !text.is_empty())
            };
            let guest: Option<u32> = read("frontend").and_then(|text| text.parse().ok());
            let address = guest.and_then(|guest| {
                let link = nodes::Link { driver: driver.domid, guest };
                let index = link.index_of(host.store, 0, sbdf)?;
                told(host.store, &link.back(&format!("vdev-{index}")))
            });
            rows.push(Row {
                driver: (driver.domid, driver.name.clone()),
                function: sbdf.to_string(),
                state: read("state").unwrap_or_else(|| "unknown".into()),
                id: read("id").unwrap_or_default(),
                guest: guest.map(|id| (id, nodes::name_of(host.store, id))),
                promised: device.guest.clone(),
                address,
                reason: read("reason"),
                mode: mode.clone(),
                mode_why: mode_why.clone(),
                reset: read("reset"),
                interrupts: read("interrupts"),
                msix: read("msix"),
                aer: read("aer"),
                serve: serve.clone(),
                counters: None,
            });
        }
    }
    rows.sort_by(|a, b| (a.driver.0, &a.function).cmp(&(b.driver.0, &b.function)));
    Ok(rows)
}

/// Asks the driver domains of `rows` for their counters. What is not told in time stays unknown.
pub fn count(host: &Host<'_>, rows: &mut [Row]) {
    let mut asked: BTreeSet<u32> = rows.iter().map(|row| row.driver.0).collect();
    // One that has not said anything yet, or no longer, need not be waited for.
    asked.retain(|domid| {
        host.store.read(0, &nodes::own(*domid, "state")).is_some()
            && host.store.write(0, &nodes::own(*domid, "report"), "1").is_ok()
    });
    let mut answered = BTreeSet::new();
    host.wait(host.patience.min(COUNTING), || {
        asked.retain(|domid| match host.store.read(0, &nodes::own(*domid, "report")).as_deref() {
            Some("") => {
                answered.insert(*domid);
                false
            }
            still => still.is_some(),
        });
        asked.is_empty().then_some(())
    });
    for domid in asked {
        // A wish is not left behind.
        let _ = host.store.remove(0, &nodes::own(domid, "report"));
    }
    for row in rows.iter_mut().filter(|row| answered.contains(&row.driver.0)) {
        let node = row.function.parse().ok().map(|sbdf| nodes::published(row.driver.0, sbdf, "counters"));
        row.counters = node.and_then(|node| told(host.store, &node)).and_then(|text| Counters::parse(&text));
    }
}

/// Who has a function, or may have it.
fn guest_of(row: &Row) -> String {
    match (&row.guest, &row.promised) {
        (Some((id, name)), _) => format!("{name} ({id})"),
        (None, Some(name)) => format!("for {name}"),
        (None, None) => "-".into(),
    }
}

/// Lines of cells, the first of which is the heading, in columns.
fn columns(lines: &[Vec<String>]) -> String {
    let count = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines.iter().map(|line| line.get(column).map_or(0, |cell| cell.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let line = |cells: &Vec<String>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_string()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// As a table, for `list`.
pub fn table(rows: &[Row]) -> String {
    let heading = ["DRIVER DOMAIN", "FUNCTION", "ID", "STATE", "GUEST", "ADDRESS IN GUEST"];
    let mut lines = vec![heading.map(String::from).to_vec()];
    for row in rows {
        let state = match &row.reason {
            Some(reason) => format!("{}: {reason}", row.state),
            None => row.state.clone(),
        };
        let address = row.address.clone().unwrap_or_else(|| "-".into());
        let driver = format!("{} ({})", row.driver.1, row.driver.0);
        lines.push(vec![driver, row.function.clone(), row.id.clone(), state, guest_of(row), address]);
    }
    columns(&lines)
}

/// A line of a paragraph.
fn detail(name: &str, value: &str) -> String {
    format!("\n  {name:17} {value}")
}

/// As a table with a line a function, for `status`. Below it: why functions are broken, and for each driver domain its
/// mode, why it is in that mode, and whether dom0's service takes part.
pub fn overview(rows: &[Row]) -> String {
    let heading =
        ["FUNCTION", "STATE", "GUEST", "MODE", "INTERRUPTS", "MSI-X", "RESET", "READS", "WRITES", "REFUSED", "ERRORS"];
    let mut lines = vec![heading.map(String::from).to_vec()];
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    for row in rows {
        let counter = |of: fn(&Counters) -> u64| row.counters.as_ref().map_or("-".into(), |all| of(all).to_string());
        let cells = [
            row.function.clone(),
            row.state.clone(),
            guest_of(row),
            if row.mode.is_empty() { "-".into() } else { row.mode.clone() },
            or_none(&row.interrupts),
            or_none(&row.msix),
            or_none(&row.reset),
            counter(|all| all.reads),
            counter(|all| all.writes),
            counter(|all| all.refused_writes),
            counter(|all| all.errors),
        ];
        lines.push(cells.map(|cell| cell.chars().take(CELL).collect()).to_vec());
    }
    let mut parts = vec![columns(&lines)];
    let reasons: Vec<String> = rows
        .iter()
        .filter_map(|row| Some(format!("{}: {}: {}", row.function, row.state, row.reason.as_ref()?)))
        .collect();
    parts.extend((!reasons.is_empty()).then(|| reasons.join("\n")));
    let mut seen = BTreeSet::new();
    for row in rows.iter().filter(|row| seen.insert(row.driver.0)) {
        let mut text = format!("{} ({})", row.driver.1, row.driver.0);
        for (name, value) in [("mode", row.mode.as_str()), ("mode because", row.mode_why.as_str())] {
            if !value.is_empty() {
                text.push_str(&detail(name, value));
            }
        }
        text.push_str(&detail("serve", row.serve.as_deref().unwrap_or("-")));
        parts.push(text);
    }
    parts.join("\n\n")
}

/// The counters of a row in words.
fn counted(row: &Row) -> String {
    row.counters.map_or("-".into(), |Counters { reads, writes, refused_writes, errors }| {
        format!("{reads} reads, {writes} writes, {refused_writes} refused, {errors} errors")
    })
}

/// As text with a paragraph a function, for `status` of named functions.
pub fn details(rows: &[Row]) -> String {
    let paragraph = |row: &Row| {
        let mut text = format!("{} {}: {}", row.function, row.id, row.state);
        if let Some((id, name)) = &row.guest {
            text.push_str(&format!(", guest {name} ({id})"));
        }
        let lines = [
            ("reason", row.reason.clone()),
            ("address in guest", row.address.clone()),
            ("promised to", row.promised.clone()),
            ("interrupts", row.interrupts.clone()),
            ("MSI-X", row.msix.clone()),
            ("reset", row.reset.clone()),
            ("last error", row.aer.clone()),
            ("counters", Some(counted(row))),
            ("driver domain", Some(format!("{} ({}), mode {}", row.driver.1, row.driver.0, row.mode))),
            ("mode because", Some(row.mode_why.clone()).filter(|why| !why.is_empty())),
            ("serve", Some(row.serve.clone().unwrap_or_else(|| "-".into()))),
        ];
        for (name, value) in lines {
            if let Some(value) = value {
                text.push_str(&detail(name, &value));
            }
        }
        text
    };
    rows.iter().map(paragraph).collect::<Vec<_>>().join("\n\n")
}

/// As JSON: an array of objects with the keys `driver_domid`, `driver`, `mode`, `mode_why`, `function`, `id`,
/// `state`, `reason`, `guest_domid`, `guest`, `promised_to`, `guest_address`, `reset`, `interrupts`, `msix`, `aer`, `reads`,
/// `writes`, `refused`, `errors`, `serve`; what does not apply, or is not known, is null.
pub fn json(rows: &[Row]) -> Value {
    rows.iter()
        .map(|row| {
            json!({
                "driver_domid": row.driver.0,
                "driver": row.driver.1,
                "mode": row.mode,
                "mode_why": row.mode_why,
                "function": row.function,
                "id": row.id,
                "state": row.state,
                "reason": row.reason,
                "guest_domid": row.guest.as_ref().map(|guest| guest.0),
                "guest": row.guest.as_ref().map(|guest| guest.1.clone()),
                "promised_to": row.promised,
                "guest_address": row.address,
                "reset": row.reset,
                "interrupts": row.interrupts,
                "msix": row.msix,
                "aer": row.aer,
                "reads": row.counters.map(|all| all.reads),
                "writes": row.counters.map(|all| all.writes),
                "refused": row.counters.map(|all| all.refused_writes),
                "errors": row.counters.map(|all| all.errors),
                "serve": row.serve,
            })
        })
        .collect()
}

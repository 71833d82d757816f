//! `list` and `status`: every driver domain's functions, where they are, and how they stand. Which functions there
//! are is read from the driver domains' configurations; how they stand, from what the driver domains publish.

use serde_json::{Value, json};

use crate::attach::Host;
use crate::error::Outcome;
use crate::nodes::{self, told};

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
}

/// All rows.
///
/// # Errors
/// `xl list` does not answer.
pub fn rows(host: &Host<'_>) -> Outcome<Vec<Row>> {
    let mut rows = Vec::new();
    for driver in host.domains.drivers()? {
        let own = |node: &str| told(host.store, &format!("/local/domain/{}/data/pciback/{node}", driver.domid));
        let (mode, mode_why) = (own("mode").unwrap_or_default(), own("mode-why").unwrap_or_default());
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
            });
        }
    }
    rows.sort_by(|a, b| (a.driver.0, &a.function).cmp(&(b.driver.0, &b.function)));
    Ok(rows)
}

/// As a table.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![["DRIVER DOMAIN", "FUNCTION", "ID", "STATE", "GUEST", "ADDRESS IN GUEST"].map(String::from)];
    for row in rows {
        let guest = match (&row.guest, &row.promised) {
            (Some((id, name)), _) => format!("{name} ({id})"),
            (None, Some(name)) => format!("for {name}"),
            (None, None) => "-".into(),
        };
        let state = match &row.reason {
            Some(reason) => format!("{}: {reason}", row.state),
            None => row.state.clone(),
        };
        let address = row.address.clone().unwrap_or_else(|| "-".into());
        lines.push([
            format!("{} ({})", row.driver.1, row.driver.0),
            row.function.clone(),
            row.id.clone(),
            state,
            guest,
            address,
        ]);
    }
    let width =
        |column: usize| lines.iter().map(|line| line.get(column).map_or(0, |cell| cell.len())).max().unwrap_or(0);
    let widths: Vec<usize> = (0..6).map(width).collect();
    let line = |cells: &[String; 6]| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_string()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// As text with a paragraph a function, for `status`.
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
            ("driver domain", Some(format!("{} ({}), mode {}", row.driver.1, row.driver.0, row.mode))),
            ("mode because", Some(row.mode_why.clone()).filter(|why| !why.is_empty())),
        ];
        for (name, value) in lines {
            if let Some(value) = value {
                text.push_str(&format!("\n  {name:17} {value}"));
            }
        }
        text
    };
    rows.iter().map(paragraph).collect::<Vec<_>>().join("\n\n")
}

/// As JSON: an array of objects with the keys `driver_domid`, `driver`, `mode`, `mode_why`, `function`, `id`,
/// `state`, `reason`, `guest_domid`, `guest`, `promised_to`, `guest_address`, `reset`, `interrupts`, `msix`; what does
/// not apply is null.
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
            })
        })
        .collect()
}

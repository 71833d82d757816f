//! xenstore: a tree, transactions over it, watches, and what others do to it between two operations.

use std::collections::BTreeMap;
use std::rc::Rc;

use pciback::platform::{Store, StoreError, Transaction};

use super::{DRIVER, World};

/// What somebody else does to xenstore between two operations of the backend; the number counts them.
pub type Meanwhile = Box<dyn FnMut(u64, &World)>;

/// A transaction: the tree as it was at its start with its own changes in it, and those changes.
pub struct Open {
    generation: u64,
    nodes: BTreeMap<String, String>,
    changes: Vec<(String, Option<String>)>,
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.into() } else { format!("/local/domain/{DRIVER}/{path}") }
}

/// Writes a node and makes its parents, as xenstored does.
fn insert(nodes: &mut BTreeMap<String, String>, path: &str, value: &str) {
    for (at, _) in path.match_indices('/').skip(1) {
        nodes.entry(path[..at].into()).or_default();
    }
    nodes.insert(path.into(), value.into());
}

/// Removes a node with all below it; returns what is gone.
fn remove(nodes: &mut BTreeMap<String, String>, path: &str) -> Vec<String> {
    let below = format!("{path}/");
    let gone: Vec<_> = nodes.keys().filter(|key| *key == path || key.starts_with(&below)).cloned().collect();
    gone.iter().for_each(|key| drop(nodes.remove(key)));
    gone
}

impl World {
    pub fn get(&self, path: &str) -> Option<String> {
        self.nodes.borrow().get(&absolute(path)).cloned()
    }

    pub fn set(&self, path: &str, value: &str) {
        let path = absolute(path);
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
        assert!(path.bytes().all(valid), "xenstored refuses the path {path}");
        insert(&mut self.nodes.borrow_mut(), &path, value);
        self.generation.set(self.generation.get() + 1);
        self.fire(&path);
    }

    pub fn remove(&self, path: &str) -> bool {
        let path = absolute(path);
        let gone = remove(&mut self.nodes.borrow_mut(), &path);
        self.generation.set(self.generation.get() + 1);
        for key in &gone {
            self.fire(key);
        }
        if !gone.is_empty() {
            self.fire(&path);
        }
        !gone.is_empty()
    }

    pub fn fire(&self, path: &str) {
        let prefix = format!("/local/domain/{DRIVER}/");
        for (watch, token) in self.watches.borrow().iter() {
            let full = absolute(watch);
            if path == full || path.starts_with(&format!("{full}/")) {
                let told = if watch.starts_with('/') { path } else { path.strip_prefix(&prefix).unwrap_or(path) };
                let event = (told.into(), token.clone());
                let mut events = self.events.borrow_mut();
                // One that waits already is not queued again, as in the image's client.
                if !events.contains(&event) {
                    events.push_back(event);
                }
            }
        }
    }
}

pub struct StoreClient(pub Rc<World>);

impl StoreClient {
    fn count(&self) -> Result<(), StoreError> {
        let world = &self.0;
        world.operations.set(world.operations.get() + 1);
        let meanwhile = world.meanwhile.borrow_mut().take();
        if let Some(mut act) = meanwhile {
            act(world.operations.get(), world);
            world.meanwhile.borrow_mut().get_or_insert(act);
        }
        if world.deaf.get() { Err(StoreError::Timeout) } else { Ok(()) }
    }

    /// Does something with the tree that `tx` sees.
    fn see<T>(&self, tx: Option<Transaction>, look: impl FnOnce(&BTreeMap<String, String>) -> T) -> T {
        match tx {
            None => look(&self.0.nodes.borrow()),
            Some(tx) => look(&self.0.transactions.borrow()[&tx.0].nodes),
        }
    }
}

impl Store for StoreClient {
    fn read(&mut self, tx: Option<Transaction>, path: &str) -> Result<String, StoreError> {
        self.count()?;
        // What is missing below a folder that only dom0 may read answers "denied", as in xenstored.
        let foreign = path.starts_with("/local/domain/");
        let found = self.see(tx, |nodes| nodes.get(&absolute(path)).cloned());
        found.ok_or(if foreign { StoreError::Denied } else { StoreError::NotFound })
    }
    fn write(&mut self, tx: Option<Transaction>, path: &str, value: &str) -> Result<(), StoreError> {
        self.count()?;
        let Some(tx) = tx else {
            self.0.set(path, value);
            return Ok(());
        };
        let mut transactions = self.0.transactions.borrow_mut();
        let open = transactions.get_mut(&tx.0).expect("an open transaction");
        insert(&mut open.nodes, &absolute(path), value);
        open.changes.push((path.into(), Some(value.into())));
        Ok(())
    }
    fn remove(&mut self, tx: Option<Transaction>, path: &str) -> Result<(), StoreError> {
        self.count()?;
        let Some(tx) = tx else {
            return if self.0.remove(path) { Ok(()) } else { Err(StoreError::NotFound) };
        };
        let mut transactions = self.0.transactions.borrow_mut();
        let open = transactions.get_mut(&tx.0).expect("an open transaction");
        if remove(&mut open.nodes, &absolute(path)).is_empty() {
            return Err(StoreError::NotFound);
        }
        open.changes.push((path.into(), None));
        Ok(())
    }
    fn list(&mut self, tx: Option<Transaction>, path: &str) -> Result<Vec<String>, StoreError> {
        self.count()?;
        let below = format!("{}/", absolute(path));
        self.see(tx, |nodes| {
            if !nodes.contains_key(&absolute(path)) {
                return Err(StoreError::NotFound);
            }
            let names = nodes.keys().filter_map(|key| key.strip_prefix(&below));
            Ok(names.filter(|rest| !rest.contains('/')).map(String::from).collect())
        })
    }
    fn begin(&mut self) -> Result<Transaction, StoreError> {
        self.count()?;
        let world = &self.0;
        let id = world.last_transaction.get() + 1;
        world.last_transaction.set(id);
        let open =
            Open { generation: world.generation.get(), nodes: world.nodes.borrow().clone(), changes: Vec::new() };
        world.transactions.borrow_mut().insert(id, open);
        assert_eq!(world.transactions.borrow().len(), 1, "one transaction at a time, and none left open");
        Ok(Transaction(id))
    }
    fn end(&mut self, tx: Transaction, commit: bool) -> Result<(), StoreError> {
        let answered = self.count();
        let world = &self.0;
        let open = world.transactions.borrow_mut().remove(&tx.0).expect("an open transaction");
        // What comes of an end without an answer nobody knows: the daemon may have seen it or not.
        if answered.is_err() && world.operations.get().is_multiple_of(2) {
            return answered;
        }
        if commit && open.generation != world.generation.get() {
            return Err(StoreError::Again);
        }
        for (path, value) in open.changes.iter().filter(|_| commit) {
            match value {
                Some(value) => world.set(path, value),
                None => drop(world.remove(path)),
            }
        }
        answered
    }
    fn watch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.count()?;
        self.0.watches.borrow_mut().push((path.into(), token.into()));
        self.0.events.borrow_mut().push_back((path.into(), token.into()));
        Ok(())
    }
    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.count()?;
        self.0.watches.borrow_mut().retain(|watch| watch != &(path.into(), token.into()));
        Ok(())
    }
}

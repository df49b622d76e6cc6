//! The model checker's side of the model: the one file that knows stateright.
use crate::world::{Action, Space, World};
use stateright::{Checker, HasDiscoveries, Model, Property};

/// What a run explored and found.
pub struct Report {
    pub states: usize,
    pub depth: usize,
    /// A property that does not hold, and how it came about.
    pub broken: Option<(&'static str, Vec<Action>)>,
    /// What was reached of what should be.
    pub reached: Vec<&'static str>,
}

impl Model for Space {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::begin(self)]
    }

    fn actions(&self, state: &World, actions: &mut Vec<Action>) {
        state.actions(self, actions);
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut next = last.clone();
        next.act(self, action);
        (next != *last).then_some(next)
    }

    fn within_boundary(&self, state: &World) -> bool {
        state.is_within(self)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one holder has a live lease", |space: &Space, world: &World| {
                !(world.has_lease(space, 0) && world.has_lease(space, 1))
            }),
            Property::always("a holder is of the last in-sync set", |_, world: &World| world.truth.usurped.is_none()),
            Property::always("one line of records", |_, world: &World| world.truth.forked.is_none()),
            Property::always("no acknowledged write is forgotten", |_, world: &World| world.truth.lost.is_none()),
            Property::always("the running guest sees what it saw", |space: &Space, world: &World| {
                world.guest_sees_its_own(space)
            }),
            Property::sometimes("takeover", |space: &Space, world: &World| world.is_changed(space, true, 1)),
            Property::sometimes("hand-over", |space: &Space, world: &World| world.is_changed(space, true, 2)),
            Property::sometimes("drop", |space: &Space, world: &World| {
                space.in_sync && world.is_changed(space, false, 1)
            }),
            Property::sometimes("join", |space: &Space, world: &World| world.is_changed(space, false, 2)),
        ]
    }
}

/// Explores the whole space breadth first, on one thread, or until something does not hold.
pub fn explore(space: Space) -> Report {
    let checker = space.checker().threads(1).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let properties = space.properties();
    let (mut broken, mut reached) = (None, Vec::new());
    for (name, path) in checker.discoveries() {
        if properties.iter().any(|p| p.name == name && p.expectation.discovery_is_failure()) {
            broken = Some((name, path.into_actions()));
        } else {
            reached.push(name);
        }
    }
    reached.sort_unstable();
    Report { states: checker.unique_state_count(), depth: checker.max_depth(), broken, reached }
}

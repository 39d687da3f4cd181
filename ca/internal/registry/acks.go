// Acknowledgements: what agents say that they serve, and agents with that.

package registry

import (
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
)

// Ack is what an agent says that it serves.
type Ack struct {
	Revision, TrustBundleSequence, PolicyGeneration uint64
}

// acks are the latest, by agent.
type acks struct {
	mu sync.Mutex
	of map[spiffeid.ID]Ack // guarded by mu
}

func newAcks() acks { return acks{of: make(map[spiffeid.ID]Ack)} }

func (a *acks) put(agent spiffeid.ID, ack Ack) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.of[agent] = ack
}

func (a *acks) get(agent spiffeid.ID) (Ack, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ack, ok := a.of[agent]
	return ack, ok
}

func (a *acks) forget(agents []spiffeid.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range agents {
		delete(a.of, id)
	}
}

// Ack notes what the agent serves.
func (f *Feed) Ack(a Ack) { f.registry.acks.put(f.agent, a) }

// Acked is what the agent said last that it serves, on any stream.
func (f *Feed) Acked() (Ack, bool) { return f.registry.acks.get(f.agent) }

// AgentState is an agent with what its streams say.
type AgentState struct {
	*attest.Agent
	Connected bool
	Ack       Ack
	Acked     bool // whether Ack was ever said since the CA started
}

// Agents returns every agent, ordered by ID.
func (r *Registry) Agents() []AgentState {
	pic := r.pic.Load()
	states := make([]AgentState, 0, pic.agents.Len())
	for _, a := range pic.agents.All() {
		states = append(states, r.state(a))
	}
	slices.SortFunc(states, func(a, b AgentState) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return states
}

// AgentState returns the agent with the given ID.
func (r *Registry) AgentState(id spiffeid.ID) (AgentState, bool) {
	a := r.pic.Load().agent(id)
	if a == nil {
		return AgentState{}, false
	}
	return r.state(a), true
}

// state is a with what its streams say.
func (r *Registry) state(a *attest.Agent) AgentState {
	ack, acked := r.acks.get(a.ID)
	return AgentState{Agent: a, Connected: r.Subscribed(a.ID), Ack: ack, Acked: acked}
}

// The pass: what an act carries that was granted. Its transaction takes the
// proposal along, by Join, so that the act is done once, or the proposal waits on.

package approval

import (
	"context"
	"errors"

	"merlon.dev/ca/internal/store"
)

// Pass lets one act be done. It belongs to the goroutine of its call.
type Pass struct {
	// Proposal is what was granted.
	Proposal *Proposal
	by, in   string
	joined   bool
}

type passKey struct{}

// Granted returns a context under which what p proposes is done, granted by the
// second administrator called by, in the act named in.
func Granted(ctx context.Context, p *Proposal, by, in string) (context.Context, *Pass) {
	pass := &Pass{Proposal: p, by: by, in: in}
	return context.WithValue(ctx, passKey{}, pass), pass
}

// From is the pass of ctx; nil: there is none.
func From(ctx context.Context) *Pass {
	p, _ := ctx.Value(passKey{}).(*Pass)
	return p
}

// Joined says whether a transaction took the proposal along.
func (p *Pass) Joined() bool { return p.joined }

// Join is what the transaction of an act adds to itself that rests on basis as it
// is in that transaction: nothing, where the act waited for nobody. It is called
// anew for each attempt. A *RefusedError says that basis is not what was proposed on.
func Join(ctx context.Context, basis string) ([]store.Cmp, []store.Op, error) {
	pass := From(ctx)
	if pass == nil {
		return nil, nil, nil
	}
	p := pass.Proposal
	if basis != p.Basis {
		return nil, nil, p.refused(WhyVoid, "is void: it was proposed while %s, and now %s", said(p.Basis), said(basis))
	}
	op, err := p.ended(Done, pass.by, pass.in, "").put()
	if err != nil {
		return nil, nil, err
	}
	pass.joined = true
	return []store.Cmp{p.cmp()}, []store.Op{op}, nil
}

func said(basis string) string {
	if basis == "" {
		return "it was not there"
	}
	return basis
}

// ErrEnded is what an act ends with whose proposal somebody else ended meanwhile.
var ErrEnded = errors.New("somebody ended the proposal meanwhile: nothing was done")

// Spend ends the proposal of ctx by itself, before an act that is no transaction of
// this store.
func Spend(ctx context.Context, st store.Store, basis string) error {
	cmps, ops, err := Join(ctx, basis)
	if err != nil || len(ops) == 0 {
		return err
	}
	res, err := st.Txn(ctx, cmps, ops, nil)
	if err == nil && !res.Succeeded {
		err = ErrEnded
	}
	return err
}

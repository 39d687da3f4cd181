package engine

// This file keeps the programs of one generation, one for each destination that
// is asked for, and holds each against OPA before it decides anything.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/topdown"

	"merlon.dev/policy"
	"merlon.dev/policy/engine/residual"
	"merlon.dev/policy/program"
)

// maxDestinations bounds the programs of one engine; calls to further
// destinations are decided by OPA.
const maxDestinations = 4096

// programs are an engine's, by destination.
type programs struct {
	byDestination sync.Map // string → *compilation
	mu            sync.Mutex
	n             int // guarded by mu
}

// compilation is one program, or why there is none. It is made once.
type compilation struct {
	begun   atomic.Bool // somebody needs it
	once    sync.Once
	program *program.Program // valid when done is closed
	encoded []byte
	err     error
	done    chan struct{}
}

// Program compiles e's policy for destination, a SPIFFE ID or empty for a service
// that has none; it is compiled once. An error of type *residual.NotNative says why there
// is no program that gives the same answers as OPA in every case, and where in
// the policy.
func (e *Engine) Program(ctx context.Context, destination string) (*program.Program, error) {
	c := e.compilation(destination)
	if c == nil {
		return nil, &residual.NotNative{Reason: fmt.Sprintf("more than %d destinations", maxDestinations)}
	}
	e.make(ctx, c, destination)
	return c.program, c.err
}

// Encoded is Program in the form that program.Decode reads.
func (e *Engine) Encoded(ctx context.Context, destination string) ([]byte, error) {
	if _, err := e.Program(ctx, destination); err != nil {
		return nil, err
	}
	return e.compilation(destination).encoded, nil
}

// Same says whether a and b certainly decide calls to destination alike: their programs
// are the same. Where one has none, nothing is certain.
func Same(ctx context.Context, a, b *Engine, destination string) bool {
	var encoded [2][]byte
	for i, e := range []*Engine{a, b} {
		if _, err := e.Program(ctx, destination); err != nil {
			return false
		}
		src, err := e.programSource(ctx, destination)
		if err != nil {
			return false
		}
		src.Generation, src.NotAfter = 0, time.Time{}
		encoded[i] = program.Encode(&src)
	}
	return bytes.Equal(encoded[0], encoded[1])
}

// OwnRego says whether the policy has Rego of its own beside grants.
func (e *Engine) OwnRego() bool { return e.ownRego }

// compilation finds or begins the one for destination; nil where there are too
// many.
func (e *Engine) compilation(destination string) *compilation {
	if c, ok := e.programs.byDestination.Load(destination); ok {
		return c.(*compilation)
	}
	e.programs.mu.Lock()
	defer e.programs.mu.Unlock()
	if e.programs.n >= maxDestinations {
		return nil
	}
	c, known := e.programs.byDestination.LoadOrStore(destination, &compilation{done: make(chan struct{})})
	if !known {
		e.programs.n++
	}
	return c.(*compilation)
}

// make compiles for all who ask: that the first of them goes away must not leave
// the others without a program. It takes bounded time by itself.
func (e *Engine) make(ctx context.Context, c *compilation, destination string) {
	ctx = context.WithoutCancel(ctx)
	c.once.Do(func() {
		defer close(c.done)
		compiling <- struct{}{}
		defer func() { <-compiling }()
		src, err := e.programSource(ctx, destination)
		if err == nil {
			// As the services get it; its texts lie side by side then.
			c.encoded = program.Encode(&src)
			c.program, err = program.Decode(c.encoded)
		}
		if err == nil {
			err = e.compare(ctx, c.program, src)
		}
		if err != nil {
			c.program, c.encoded, c.err = nil, nil, asNotNative(err)
		}
	})
}

func asNotNative(err error) error {
	if why := (*residual.NotNative)(nil); errors.As(err, &why) {
		return err
	}
	return &residual.NotNative{Reason: err.Error()}
}

// native is the program for destination if there is one by now. Compiling and
// comparing take milliseconds, and OPA decides meanwhile.
func (e *Engine) native(destination string) *program.Program {
	c := e.compilation(destination)
	if c == nil {
		return nil
	}
	select {
	case <-c.done:
		return c.program
	default:
		if c.begun.CompareAndSwap(false, true) {
			go e.make(context.Background(), c, destination)
		}
		return nil
	}
}

// Mismatches is how many programs gave another answer than OPA when they were
// compared, and are not used. Each is a bug of Merlon, and logged as an error.
func (e *Engine) Mismatches() uint64 { return e.mismatches.Load() }

// samples is how many calls a new program is compared on.
const samples = 48

// sampleLimit is how long OPA may take for one of them; on a loaded machine
// EvaluationLimit says little.
const sampleLimit = 2 * time.Second

// compareLimit is how long OPA may take for all of them.
const compareLimit = 10 * time.Second

// compare is holdAgainstOPA in bounded time.
func (e *Engine) compare(ctx context.Context, p *program.Program, src program.Source) error {
	var err error
	if late := e.inTime(ctx, compareLimit, func(topdown.Cancel) { err = e.holdAgainstOPA(p, &src) }); late != nil {
		return fmt.Errorf("comparison with OPA: %v", late)
	}
	return err
}

// holdAgainstOPA compares p with OPA on calls made of what the policy names.
func (e *Engine) holdAgainstOPA(p *program.Program, src *program.Source) error {
	now, begun := e.now(), time.Now()
	for _, in := range sampleCalls(src, samples) {
		d := policy.Decision{}
		a := e.evaluate(context.Background(), in, now, sampleLimit, &d)
		if errors.Is(a.err, errStopped) || errors.Is(a.err, errStuck) || time.Since(begun) > compareLimit {
			return &residual.NotNative{Reason: fmt.Sprintf("OPA takes more than %v for a call to compare with", sampleLimit)}
		}
		if a.err != nil {
			d = policy.Decision{Reason: policy.Error}
		}
		v := p.Decide(in, now)
		if v.Reason == policy.StalePolicy || v.Reason == policy.BadRequest {
			continue // which OPA is not asked about
		}
		if v.Reason != d.Reason || v.RuleID != d.RuleID || !slices.Equal(v.DryRun, a.dryRun) || !v.Response.Equal(d.Response) {
			e.mismatches.Add(1)
			e.log.Error("a compiled policy differs from OPA's answer; OPA decides for this destination: please report this as a bug of Merlon",
				slog.String("destination", src.Destination), slog.Uint64("policy_revision", e.generation), slog.Any("call", in),
				slog.String("compiled", fmt.Sprintf("%s %s", v.Reason, v.RuleID)), slog.String("opa", fmt.Sprintf("%s %s", d.Reason, d.RuleID)), slog.Any("err", a.err))
			return &residual.NotNative{Reason: fmt.Sprintf("the compiled form says %s where OPA says %s", v.Reason, d.Reason)}
		}
	}
	return nil
}

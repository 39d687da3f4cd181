package program

// This file decides which answer of own Rego goes with a verdict: objects of
// opa-envoy-plugin's kind, each with the calls that it is the answer to.

import (
	"fmt"

	"merlon.dev/policy"
)

// Response is what own Rego answers to some calls.
type Response struct {
	// When says to which; nil for all.
	When *Expr
	// Allow is set for an answer that allows: it goes with calls that are allowed,
	// by whatever. Others go with denials by default.
	Allow bool
	// Send is what to send; nil for nothing.
	Send *policy.Response
}

// maxResponses bounds those of one program.
const maxResponses = 1024

// copyResponses prepares the answers of p.
func (p *Program) copyResponses(nodes *int) error {
	if len(p.source.Responses) > maxResponses {
		return fmt.Errorf("more than %d responses", maxResponses)
	}
	own := append([]Response(nil), p.source.Responses...)
	for i := range own {
		if send := own[i].Send; send != nil {
			if err := send.Check(); err != nil {
				return err
			}
		}
		if own[i].When == nil {
			continue
		}
		when := *own[i].When
		if err := when.check(0, 0, nodes); err != nil {
			return err
		}
		own[i].When = &when
	}
	p.source.Responses = own
	return nil
}

// response is the first answer that goes with the verdict.
func (p *Program) response(allow bool, in *policy.Input, at *elements) *policy.Response {
	for i := range p.source.Responses {
		r := &p.source.Responses[i]
		if r.Allow == allow && (r.When == nil || r.When.holds(in, at)) {
			return r.Send
		}
	}
	return nil
}

func (w *writer) response(r *Response) {
	w.flags(r.Allow, r.Send != nil)
	w.condition(r.When)
	if r.Send == nil {
		return
	}
	w.number(uint64(r.Send.Status))
	w.text(r.Send.Body)
	fields := func(f *policy.HeaderField) {
		w.text(f.Name)
		w.text(f.Value)
	}
	writeList(w, r.Send.Headers, fields)
	writeList(w, r.Send.ResponseHeaders, fields)
	w.textList(r.Send.RemoveHeaders)
}

func (r *reader) response(to *Response) {
	flags := r.byte()
	if flags > 3 {
		r.fail()
		return
	}
	to.Allow = flags&1 != 0
	to.When = r.condition()
	if flags&2 == 0 {
		return
	}
	to.Send = &policy.Response{Status: r.small(), Body: r.text()}
	fields := func(f *policy.HeaderField) { f.Name, f.Value = r.text(), r.text() }
	to.Send.Headers = readOptional(r, fields)
	to.Send.ResponseHeaders = readOptional(r, fields)
	to.Send.RemoveHeaders = r.textList()
	if !r.bad && to.Send.Check() != nil {
		r.fail()
	}
}

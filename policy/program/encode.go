package program

// This file is the form in which programs travel from the agent to the services
// of its node: a version byte, a table of the texts, then numbers (varints) that
// name them. It is as small as the policy is, and read in one pass.

import (
	"encoding/binary"
	"errors"
	"time"
)

// MaxBytes is the longest encoded program that Decode reads.
const MaxBytes = 16 << 20

// version changes with each change of the form. A reader refuses others, and asks
// the agent for each decision instead.
const version = 2

// ErrVersion is a program in a form that this version of Merlon does not read.
var ErrVersion = errors.New("program: made by another version of merlon")

// Encode writes src.
func Encode(src *Source) []byte {
	w := writer{numbers: map[string]uint64{}}
	w.number(src.Generation)
	w.time(src.NotAfter)
	w.text(src.Destination)
	w.number(uint64(len(src.Grants)))
	for i := range src.Grants {
		w.grant(&src.Grants[i])
	}
	w.condition(src.Deny)
	w.condition(src.Allow)
	w.number(uint64(len(src.Responses)))
	for i := range src.Responses {
		w.response(&src.Responses[i])
	}

	out := append(make([]byte, 0, len(w.body)+len(w.texts)*16), version)
	out = binary.AppendUvarint(out, uint64(len(w.texts)))
	for _, t := range w.texts {
		out = binary.AppendUvarint(out, uint64(len(t)))
		out = append(out, t...)
	}
	return append(out, w.body...)
}

type writer struct {
	numbers map[string]uint64
	texts   []string
	body    []byte
}

func (w *writer) number(n uint64) { w.body = binary.AppendUvarint(w.body, n) }

func (w *writer) flags(flags ...bool) {
	var b byte
	for i, f := range flags {
		if f {
			b |= 1 << i
		}
	}
	w.body = append(w.body, b)
}

func (w *writer) time(t time.Time) {
	w.flags(!t.IsZero())
	if !t.IsZero() {
		w.body = binary.AppendVarint(w.body, t.UnixNano())
	}
}

func (w *writer) text(t string) {
	n, known := w.numbers[t]
	if !known {
		n = uint64(len(w.texts))
		w.numbers[t] = n
		w.texts = append(w.texts, t)
	}
	w.number(n)
}

// writeList writes nil as 0, else one more than the length.
func writeList[T any](w *writer, items []T, write func(*T)) {
	if items == nil {
		w.number(0)
		return
	}
	w.number(uint64(len(items)) + 1)
	for i := range items {
		write(&items[i])
	}
}

func (w *writer) textList(items []string) {
	writeList(w, items, func(t *string) { w.text(*t) })
}

func (w *writer) grant(g *Grant) {
	w.text(g.ID)
	w.body = append(w.body, byte(g.Kind))
	w.text(string(g.Protocol))
	w.textList(g.From)
	w.textList(g.Methods)
	writeList(w, g.Paths, func(p *Path) {
		w.text(p.Text)
		w.flags(p.More)
		writeList(w, p.Parts, func(part *Part) {
			w.flags(part.Free)
			w.text(part.Text)
		})
	})
	w.body = binary.AppendVarint(w.body, g.Expires)
}

func (w *writer) condition(e *Expr) {
	w.flags(e != nil)
	if e != nil {
		w.expr(e)
	}
}

func (w *writer) expr(e *Expr) {
	w.body = append(w.body, byte(e.Op))
	switch e.Op {
	case And, Or, Not:
	case Some, Every, Listed:
		w.list(&e.List)
	case CountIs, CountUp:
		w.list(&e.List)
		w.number(uint64(e.N))
	case Defined:
		w.operand(&e.A)
	case In, Switch:
		w.operand(&e.A)
		w.textList(e.Set)
	case Matches:
		w.operand(&e.A)
		w.text(e.Pattern)
	case Equal, Differs, Less, AtMost, Prefix, Suffix, Contains:
		w.operand(&e.A)
		w.operand(&e.B)
	}
	switch e.Op {
	case And, Or, Not, Some, Every, Switch:
		writeList(w, e.Of, w.expr)
	}
}

func (w *writer) operand(o *Operand) {
	w.body = append(w.body, byte(o.Field), byte(o.Case))
	switch o.Field {
	case Text, Header:
		w.text(o.Text)
	case Element:
		w.number(uint64(o.N))
	case ListAt:
		w.number(uint64(o.N))
		w.list(o.List)
	}
}

func (w *writer) list(l *List) {
	w.body = append(w.body, byte(l.Kind))
	switch l.Kind {
	case QueryValues, HeaderValues:
		w.text(l.Key)
	case Split:
		w.text(l.Key)
		w.operand(l.Of)
	}
}

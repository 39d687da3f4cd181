package program

// This file reads what Encode wrote, from another process: bounded, and to the
// last byte.

import (
	"errors"
	"fmt"
	"time"

	"merlon.dev/policy"
)

// Decode reads what Encode wrote and makes the program. It reads at most
// MaxBytes and allocates in proportion to them; whatever is malformed is an error,
// and ErrVersion where another version of Merlon wrote it.
func Decode(data []byte) (*Program, error) {
	src, err := decode(data)
	if err != nil {
		return nil, err
	}
	return New(src)
}

func decode(data []byte) (src Source, err error) {
	if len(data) > MaxBytes {
		return Source{}, fmt.Errorf("program: %d bytes are more than %d", len(data), MaxBytes)
	}
	if len(data) == 0 || data[0] != version {
		return Source{}, ErrVersion
	}
	r := reader{rest: string(data[1:])}
	r.texts = readList(&r, r.number(), func(t *string) { *t = r.cut(r.number()) })
	src.Generation = r.number()
	if r.flag() {
		src.NotAfter = time.Unix(0, r.signed()).UTC()
	}
	src.Destination = r.text()
	src.Grants = readList(&r, r.number(), r.grant)
	src.Deny, src.Allow = r.condition(), r.condition()
	src.Responses = readList(&r, r.number(), r.response)
	if !r.bad && r.rest != "" {
		r.bad = true
	}
	if r.bad {
		return Source{}, errors.New("program: malformed")
	}
	return src, nil
}

// reader reads until something is malformed; then all that it reads is zero.
type reader struct {
	rest  string
	texts []string
	bad   bool
	depth int // of the condition that is being read
	nodes int
}

func (r *reader) fail() { r.bad, r.rest = true, "" }

func (r *reader) byte() (b byte) {
	if r.rest == "" {
		r.fail()
		return 0
	}
	b, r.rest = r.rest[0], r.rest[1:]
	return b
}

func (r *reader) number() (n uint64) {
	for shift := 0; shift < 64; shift += 7 {
		b := r.byte()
		if shift == 63 && b > 1 || shift > 0 && b == 0 { // too large, or not the shortest form
			break
		}
		if n |= uint64(b&0x7f) << shift; b < 0x80 {
			return n
		}
	}
	r.fail()
	return 0
}

func (r *reader) signed() int64 {
	n := r.number()
	return int64(n>>1) ^ -int64(n&1)
}

func (r *reader) flag() bool {
	b := r.byte()
	if b > 1 {
		r.fail()
	}
	return b == 1
}

func (r *reader) cut(n uint64) (s string) {
	if n > uint64(len(r.rest)) {
		r.fail()
		return ""
	}
	s, r.rest = r.rest[:n], r.rest[n:]
	return s
}

func (r *reader) text() string {
	n := r.number()
	if n >= uint64(len(r.texts)) {
		r.fail()
		return ""
	}
	return r.texts[n]
}

// readList reads n items; each takes a byte at least.
func readList[T any](r *reader, n uint64, read func(*T)) []T {
	if n > uint64(len(r.rest)) {
		r.fail()
		return nil
	}
	items := make([]T, 0, min(n, 64))
	for range n {
		var item T
		if read(&item); r.bad {
			return nil
		}
		items = append(items, item)
	}
	return items
}

// readOptional reads a list that can be nil.
func readOptional[T any](r *reader, read func(*T)) []T {
	n := r.number()
	if n == 0 {
		return nil
	}
	return readList(r, n-1, read)
}

func (r *reader) textList() []string {
	return readOptional(r, func(t *string) { *t = r.text() })
}

func (r *reader) grant(g *Grant) {
	g.ID = r.text()
	g.Kind = Kind(r.byte())
	g.Protocol = policy.Protocol(r.text())
	g.From = r.textList()
	g.Methods = r.textList()
	g.Paths = readOptional(r, func(p *Path) {
		p.Text = r.text()
		p.More = r.flag()
		p.Parts = readOptional(r, func(part *Part) {
			part.Free = r.flag()
			part.Text = r.text()
		})
	})
	g.Expires = r.signed()
}

func (r *reader) condition() *Expr {
	if !r.flag() {
		return nil
	}
	e := new(Expr)
	r.expr(e)
	return e
}

func (r *reader) expr(e *Expr) {
	r.nodes++
	if r.depth++; r.depth > maxDepth || r.nodes > maxNodes {
		r.fail()
		return
	}
	e.Op = Op(r.byte())
	switch e.Op {
	case Some, Every, Listed:
		r.list(&e.List)
	case CountIs, CountUp:
		r.list(&e.List)
		e.N = r.small()
	case Defined:
		r.operand(&e.A)
	case In, Switch:
		r.operand(&e.A)
		e.Set = r.textList()
	case Matches:
		r.operand(&e.A)
		e.Pattern = r.text()
	case Equal, Differs, Less, AtMost, Prefix, Suffix, Contains:
		r.operand(&e.A)
		r.operand(&e.B)
	}
	switch e.Op {
	case And, Or, Not, Some, Every, Switch:
		e.Of = readOptional(r, r.expr)
	}
	r.depth--
}

func (r *reader) small() int {
	n := r.number()
	if n > 1<<20 {
		r.fail()
		return 0
	}
	return int(n)
}

func (r *reader) operand(o *Operand) {
	if r.depth++; r.depth > maxDepth {
		r.fail()
		return
	}
	o.Field, o.Case = Field(r.byte()), Case(r.byte())
	switch o.Field {
	case Text, Header:
		o.Text = r.text()
	case Element:
		o.N = r.small()
	case ListAt:
		o.N = r.small()
		o.List = new(List)
		r.list(o.List)
	}
	r.depth--
}

func (r *reader) list(l *List) {
	l.Kind = Lists(r.byte())
	switch l.Kind {
	case QueryValues, HeaderValues:
		l.Key = r.text()
	case Split:
		l.Key = r.text()
		l.Of = new(Operand)
		r.operand(l.Of)
	}
}

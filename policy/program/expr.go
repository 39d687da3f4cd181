package program

// This file evaluates what partial evaluation left of a policy's own Rego:
// conditions on the fields of a call. Every operand has one type, known when the
// program is made, so that none of OPA's type errors can occur. A condition on a
// field that the call does not have does not hold, and neither does its opposite;
// Not holds where its operand does not, as Rego's "not".

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"merlon.dev/policy"
)

// Op says what an Expr asks.
type Op uint8

// The operations.
const (
	False Op = iota // never holds
	True
	And // all of Of
	Or  // one of Of
	Not // Of[0] does not hold

	Defined  // the call has A
	Equal    // A = B
	Differs  // A != B
	Less     // A < B, by bytes
	AtMost   // A <= B
	Prefix   // A begins with B
	Suffix   // A ends in B
	Contains // A contains B
	In       // A is one of Set
	Switch   // A is Set[i], and Of[i] holds
	Matches  // A matches the regular expression Pattern

	Listed  // the call has List
	Some    // Of[0] holds for some element of List
	Every   // Of[0] holds for each element of List, which the call has
	CountIs // List has N elements
	CountUp // List has N elements or more

	ops // their number
)

// Expr is a condition. The zero value never holds.
type Expr struct {
	Op      Op
	Of      []Expr
	A, B    Operand
	Set     []string
	Pattern string
	List    List
	N       int

	set     set
	cases   map[string]int
	pattern *regexp.Regexp
	longest int // text that pattern may be matched with
}

// Field is a text that a call may have.
type Field uint8

// The fields. Their values are those of the input that OPA gets.
const (
	Text        Field = iota // no field: Operand.Text itself
	Element                  // the element of the N-th Some or Every, from outside
	SourceID                 // attributes.source.principal
	SourceTrust              // spiffe.source.trust_domain
	SourcePath               // spiffe.source.path
	Protocol                 // protocol
	Method                   // attributes.request.http.method
	URL                      // attributes.request.http.path: path and query
	Host                     // attributes.request.http.host
	Header                   // attributes.request.http.headers[Text]
	Service                  // grpc.service
	RPC                      // grpc.method
	ListAt                   // the element of List at N
	fields                   // their number
)

// Operand is a text: a constant or a field, in lower or upper case if asked.
type Operand struct {
	Field Field
	Text  string
	N     int
	List  *List
	Case  Case
}

// Case changes the letters of an operand.
type Case uint8

// The cases.
const (
	AsIs Case = iota
	Lower
	Upper
	cases
)

// Lists says what a List has.
type Lists uint8

// The lists.
const (
	NoList       Lists = iota
	Segments           // parsed_path
	QueryValues        // parsed_query[Key]
	HeaderValues       // attributes.request.http.headers_all[Key]
	Split              // Of, split at Key
	lists
)

// List is a list of texts that a call may have.
type List struct {
	Kind Lists
	Key  string
	Of   *Operand
}

// Bounds of programs, which may come from another process.
const (
	maxNodes  = 1 << 16
	maxDepth  = 64
	maxNested = 4 // Some and Every within each other
)

// check prepares e and says what is malformed. nested is how many lists are
// being walked through; nodes counts up to maxNodes.
func (e *Expr) check(depth, nested int, nodes *int) error {
	*nodes++
	of := map[Op]int{Not: 1, Some: 1, Every: 1, And: -1, Or: -1, Switch: -1}[e.Op]
	switch {
	case e.Op >= ops:
		return fmt.Errorf("operation %d is not known", e.Op)
	case *nodes > maxNodes || depth > maxDepth:
		return errors.New("a condition is too large")
	case of >= 0 && len(e.Of) != of, e.Op == Switch && len(e.Of) != len(e.Set):
		return fmt.Errorf("operation %d has %d conditions", e.Op, len(e.Of))
	}
	for _, err := range []error{e.A.check(depth+1, nested), e.B.check(depth+1, nested), e.List.check(depth+1, nested)} {
		if err != nil {
			return err
		}
	}
	switch e.Op {
	case In:
		e.set = newSet(e.Set)
	case Switch:
		e.cases = make(map[string]int, len(e.Set))
		for i, text := range e.Set {
			e.cases[text] = i
		}
	case Matches:
		var err error
		if e.pattern, err = regexp.Compile(e.Pattern); err != nil {
			return err
		}
		e.longest = MaxSteps/PatternCost(e.Pattern) - 1
	case Some, Every:
		if nested++; nested > maxNested {
			return errors.New("lists are nested too deeply")
		}
	}
	e.Of = slices.Clone(e.Of)
	for i := range e.Of {
		if err := e.Of[i].check(depth+1, nested, nodes); err != nil {
			return err
		}
	}
	return nil
}

func (o *Operand) check(depth, nested int) error {
	switch {
	case o.Field >= fields || o.Case >= cases:
		return fmt.Errorf("field %d is not known", o.Field)
	case depth > maxDepth:
		return errors.New("a condition is too large")
	case o.Field == Element && (o.N < 0 || o.N >= nested):
		return errors.New("an element of no list is asked for")
	case o.Field == ListAt && (o.List == nil || o.N < 0):
		return errors.New("an element of no list is asked for")
	case o.Field == ListAt:
		return o.List.check(depth+1, nested)
	}
	return nil
}

func (l *List) check(depth, nested int) error {
	switch {
	case l.Kind >= lists:
		return fmt.Errorf("list %d is not known", l.Kind)
	case l.Kind == Split && (l.Of == nil || l.Key == ""):
		return errors.New("a list is split from nothing")
	case l.Kind == Split:
		return l.Of.check(depth+1, nested)
	}
	return nil
}

// elements are those of the lists that are being walked through, the innermost
// last.
type elements struct {
	of     [maxNested]string
	n      int
	failed bool // a condition that was asked could not be decided
}

func (e *Expr) holds(in *policy.Input, at *elements) bool {
	switch e.Op {
	case True:
		return true
	case And:
		for i := range e.Of {
			if !e.Of[i].holds(in, at) {
				return false
			}
		}
		return true
	case Or:
		for i := range e.Of {
			if e.Of[i].holds(in, at) {
				return true
			}
		}
		return false
	case Not:
		return !e.Of[0].holds(in, at)
	case Listed, Some, Every, CountIs, CountUp:
		return e.holdsOfList(in, at)
	}
	a, ok := e.A.value(in, at)
	if !ok {
		return false
	}
	switch e.Op {
	case Defined:
		return true
	case In:
		return e.set.has(a)
	case Switch:
		i, ok := e.cases[a]
		return ok && e.Of[i].holds(in, at)
	case Matches:
		return e.matches(a, at)
	}
	b, ok := e.B.value(in, at)
	return ok && compare(e.Op, a, b)
}

func compare(op Op, a, b string) bool {
	switch op {
	case Equal:
		return a == b
	case Differs:
		return a != b
	case Less:
		return cmp.Less(a, b)
	case AtMost:
		return a <= b
	case Prefix:
		return strings.HasPrefix(a, b)
	case Suffix:
		return strings.HasSuffix(a, b)
	case Contains:
		return strings.Contains(a, b)
	}
	return false
}

func (e *Expr) holdsOfList(in *policy.Input, at *elements) bool {
	w, ok := e.List.walk(in, at)
	if !ok {
		return false
	}
	switch e.Op {
	case Listed:
		return true
	case CountIs, CountUp:
		n := 0
		for _, ok := w.next(); ok; _, ok = w.next() {
			n++
		}
		return n == e.N || e.Op == CountUp && n > e.N
	}
	at.n++
	defer func() { at.n-- }()
	for element, ok := w.next(); ok; element, ok = w.next() {
		at.of[at.n-1] = element
		if holds := e.Of[0].holds(in, at); holds == (e.Op == Some) {
			return holds
		}
	}
	return e.Op == Every
}

func (o *Operand) value(in *policy.Input, at *elements) (string, bool) {
	v, ok := o.field(in, at)
	switch {
	case !ok || o.Case == AsIs:
	case o.Case == Lower:
		v = strings.ToLower(v)
	case o.Case == Upper:
		v = strings.ToUpper(v)
	}
	return v, ok
}

func (o *Operand) field(in *policy.Input, at *elements) (string, bool) {
	switch o.Field {
	case Text:
		return o.Text, true
	case Element:
		return at.of[o.N], true
	case SourceID:
		return in.Source, true
	case SourceTrust:
		domain, _, _ := strings.Cut(strings.TrimPrefix(in.Source, "spiffe://"), "/")
		return domain, true
	case SourcePath:
		rest := strings.TrimPrefix(in.Source, "spiffe://")
		if i := strings.IndexByte(rest, '/'); i >= 0 && i+1 < len(rest) {
			return rest[i:], true
		}
		return "", true
	case Protocol:
		return string(in.Protocol), true
	case ListAt:
		return o.List.at(o.N, in, at)
	}
	if in.Protocol != policy.HTTP && in.Protocol != policy.GRPC {
		return "", false
	}
	return o.ofRequest(in)
}

func (o *Operand) ofRequest(in *policy.Input) (string, bool) {
	switch o.Field {
	case Method:
		return in.Method, true
	case URL:
		if in.Query == "" {
			return in.Path, true
		}
		return in.Path + "?" + in.Query, true
	case Host:
		return in.Host, true
	case Header:
		values, ok := in.Header(o.Text)
		if len(values) == 1 {
			return values[0], ok
		}
		return strings.Join(values, ","), ok
	case Service, RPC:
		service, method, ok := policy.SplitRPC(in.Path)
		if o.Field == RPC {
			service = method
		}
		return service, ok && in.Protocol == policy.GRPC
	}
	return "", false
}

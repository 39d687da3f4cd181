package program

// This file walks through the lists of a call without building them.

import (
	"net/url"
	"strings"

	"merlon.dev/policy"
)

// walk begins a walk through l; false where the call does not have it.
func (l *List) walk(in *policy.Input, at *elements) (w walker, ok bool) {
	if l.Kind == Split {
		text, ok := l.Of.value(in, at)
		return walker{kind: Split, rest: text, separator: l.Key, more: true}, ok
	}
	if in.Protocol != policy.HTTP && in.Protocol != policy.GRPC {
		return walker{}, false
	}
	switch l.Kind {
	case Segments:
		return walker{kind: Split, rest: strings.TrimLeft(policy.DecodePath(in.Path), "/"), separator: "/", more: true}, true
	case HeaderValues:
		values, ok := in.Header(l.Key)
		return walker{kind: HeaderValues, values: values}, ok
	case QueryValues:
		w := walker{kind: QueryValues, rest: in.Query, name: l.Key}
		first := w
		_, ok := first.next()
		return w, ok
	}
	return walker{}, false
}

// at is the element of l at n.
func (l *List) at(n int, in *policy.Input, at *elements) (string, bool) {
	w, ok := l.walk(in, at)
	if !ok {
		return "", false
	}
	for ; ; n-- {
		element, ok := w.next()
		if !ok || n == 0 {
			return element, ok
		}
	}
}

// walker is a place in a list.
type walker struct {
	kind            Lists
	rest, separator string
	more            bool // of a split: rest is one more element at least
	values          []string
	name            string
}

func (w *walker) next() (string, bool) {
	switch w.kind {
	case Split:
		if !w.more {
			return "", false
		}
		var element string
		element, w.rest, w.more = strings.Cut(w.rest, w.separator)
		return element, true
	case HeaderValues:
		if len(w.values) == 0 {
			return "", false
		}
		element := w.values[0]
		w.values = w.values[1:]
		return element, true
	case QueryValues:
		return w.nextOfQuery()
	}
	return "", false
}

// nextOfQuery goes by url.ParseQuery, which leaves out what is malformed.
func (w *walker) nextOfQuery() (string, bool) {
	for w.rest != "" {
		var pair string
		pair, w.rest, _ = strings.Cut(w.rest, "&")
		if pair == "" || strings.IndexByte(pair, ';') >= 0 {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(name)
		if err != nil || name != w.name {
			continue
		}
		if value, err = url.QueryUnescape(value); err != nil {
			continue
		}
		return value, true
	}
	return "", false
}

// Package settings reads what a program of Merlon is told: flags win over the
// environment, the environment over the file, the file over the defaults. A program
// says by a table what it can be told, and the yaml tags of its configuration where
// that goes.
package settings

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// Setting is a field of the configuration C that flags and the environment can set.
type Setting[C any] struct {
	// Key is the field's yaml tag, and with dashes for underscores its flag.
	Key string
	// Usage is what -h says, with the name of its value in backquotes.
	Usage string
	// Secret settings have no flag: everybody can read command lines.
	Secret bool
	// Switch is a flag that stands without a value.
	Switch bool
	// Join stands between the values of a flag that is given more than once, which Set
	// then takes as one. Empty: the last one counts.
	Join string
	// Set takes what was given. Nil takes it by the field's type: text, a number, true
	// or false, a duration, what reads itself from text, or a list at whose commas the
	// parts are told apart.
	Set func(c *C, text string) error
}

// flag is the setting as it stands on a command line.
func (s *Setting[C]) flag() string { return "-" + strings.ReplaceAll(s.Key, "_", "-") }

// set puts text into c.
func (s *Setting[C]) set(c *C, text string) error {
	if s.Set != nil {
		return s.Set(c, text)
	}
	field := fieldOf(reflect.ValueOf(c).Elem(), s.Key)
	if !field.IsValid() {
		panic("settings: no field has the yaml tag " + s.Key)
	}
	return fill(field.Addr().Interface(), text)
}

func fieldOf(c reflect.Value, key string) reflect.Value {
	for i := range c.NumField() {
		if c.Type().Field(i).Tag.Get("yaml") == key {
			return c.Field(i)
		}
	}
	return reflect.Value{}
}

// fill is set for what needs no word of its own.
func fill(field any, text string) (err error) {
	switch f := field.(type) {
	case encoding.TextUnmarshaler:
		return f.UnmarshalText([]byte(text))
	case *string:
		*f = text
	case *bool:
		if *f, err = strconv.ParseBool(text); err != nil {
			return fmt.Errorf("%q is neither true nor false", text)
		}
	case *int:
		if *f, err = strconv.Atoi(text); err != nil {
			return fmt.Errorf("%q is not a number", text)
		}
	case *time.Duration:
		if *f, err = time.ParseDuration(text); err != nil {
			return fmt.Errorf("%q is not a duration such as 5m", text)
		}
	case *uint32:
		*f, err = uid(text)
	case *[]string:
		*f = List(text)
	case *[]uint32:
		*f, err = uids(text)
	default:
		panic(fmt.Sprintf("settings: a %T has to say by Set how it is read", field))
	}
	return err
}

// List is the parts of text between commas, without the spaces around them; nothing
// makes a list that is empty, and not nil.
func List(text string) []string {
	parts := []string{}
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return parts
}

func uids(text string) (ids []uint32, err error) {
	for _, part := range List(text) {
		id, err := uid(part)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func uid(text string) (uint32, error) {
	id, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q is not a uid", text)
	}
	return uint32(id), nil
}

// InvalidError is a setting that a program refuses.
type InvalidError struct {
	Field  string // as spelled in the file
	Reason string
	Hint   string // what to do; may be empty
}

// Error names field and reason.
func (e *InvalidError) Error() string { return e.Field + ": " + e.Reason }

// UsageError is a mistake in the command line itself, or in naming the file.
type UsageError struct {
	Err  error
	Hint string // what to do
}

// Error implements error.
func (e *UsageError) Error() string { return e.Err.Error() }

// Unwrap returns the mistake.
func (e *UsageError) Unwrap() error { return e.Err }

// Hint says what to do about err, where it is of this package and known.
func Hint(err error) string {
	if e, ok := errors.AsType[*InvalidError](err); ok {
		return e.Hint
	}
	if e, ok := errors.AsType[*UsageError](err); ok {
		return e.Hint
	}
	return ""
}
